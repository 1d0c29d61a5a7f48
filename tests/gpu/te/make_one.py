"""One rank of a case: a random model is loaded into Megatron, trained, saved, and exported from memory.

python3 make_one.py OUT CASE        or under torchrun, where the case has several ranks
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, config_of
from models import build
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from training import (
    BLOCK,
    ITERATION,
    evaluate,
    high_precision,
    is_fp8,
    quantize,
    tokens_of_step,
    train_step,
    vary_blocks,
)
from transformers import AutoModelForCausalLM

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_parameters
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from tests.support.tiny_models import randomize


@dataclass(frozen=True, slots=True)
class Expected:
    """What has to come out of a checkpoint. A tensor is told by dtype, shape and the beginning of its SHA-256.

    Args:
        versions: of the packages that made it.
        scheme: of the export.
        logits: of the model as it was saved; see `training.evaluate`.
        continued: the same after one more step of training.
        tensors: Hugging Face name → tensor of the live export; of a model with FP8 parameters, that of the same model
            with the parameters that Transformer Engine dequantizes them to.
        parameters: Megatron name, in the mappings' spelling → FP8 parameter, dequantized by Transformer Engine.
        codes: Hugging Face name → bytes of a parameter in 128×128 blocks, as Transformer Engine holds them.
        scales: Hugging Face name → its scales, `[out/128, in/128]`; None where Transformer Engine's blocks are no
            blocks of this tensor.
    """

    versions: dict[str, str]
    scheme: str
    logits: list[list[float]]
    continued: list[list[float]]
    tensors: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    scales: dict[str, list[list[float]] | None] = field(default_factory=dict)


def main(out: Path, name: str) -> None:
    case, directory = CASES[name], out / name
    directory.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(tp=case.tp, ep=case.ep):
        if world_rank() == 0:
            save_random_model(case, directory / "hf")
            shutil.copy(directory / "hf" / "config.json", directory)
        torch.distributed.barrier()
        bridge = AutoBridge.from_hf_pretrained(directory / "hf")
        model = build(bridge.hf, case)
        bridge.load_hf_weights(model)
        if case.fp8_parameters and case.fp8 == "blockwise":
            vary_blocks(model)
        if case.qat:
            quantize(model, cache=case.cache)
        for step in range(ITERATION):
            train_step(model, tokens_of_step(step))
        logits = evaluate(model)
        arguments = arguments_of(bridge, model, case)
        megatron.save_checkpoint(model, directory / "checkpoint", iteration=ITERATION, arguments=arguments)
        found = export(bridge, model, case, directory)
        train_step(model, tokens_of_step(ITERATION))
        scheme = "nvfp4" if case.qat else "none"
        expected = Expected(versions(), scheme, logits, evaluate(model), **found)
        if world_rank() == 0:
            (directory / "expected.json").write_text(json.dumps(asdict(expected), indent=1, ensure_ascii=False))
            print(f"{len(expected.tensors)} tensors, {len(expected.codes)} in blocks")


def save_random_model(case: Case, directory: Path) -> None:
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config_of(case), dtype=torch.float32)
    randomize(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    (model if case.fp32 else model.bfloat16()).save_pretrained(directory)


def arguments_of(bridge: AutoBridge, model: Any, case: Case) -> argparse.Namespace:
    """The arguments that Megatron's training saves, as far as they describe the model and Transformer Engine's part."""
    arguments = megatron_arguments(bridge.hf, model.config, getattr(model, "hybrid_layer_pattern", None))
    arguments.transformer_impl = "transformer_engine"
    arguments.bf16 = not case.fp32
    arguments.fp8, arguments.fp8_recipe = model.config.fp8, case.fp8 or "delayed"
    arguments.fp8_param_gather = case.fp8_parameters
    return arguments


def export(bridge: AutoBridge, model: Any, case: Case, directory: Path) -> dict[str, Any]:
    """The fields of `Expected` that an export gives, on the first rank."""
    plain = replace(case, fp8=None, fp8_parameters=False)
    live = twin_of(bridge, model, plain, high_precision) if case.fp8_parameters else model
    bridge.save_hf_pretrained(live, directory / "live", scheme="nvfp4" if case.qat else "none")
    in_blocks = case.fp8_parameters and case.fp8 == "blockwise"
    if in_blocks:
        for name, convert in (("codes", codes_of), ("scales", scales_of)):
            twin = twin_of(bridge, model, replace(plain, fp32=True), convert)
            bridge.save_hf_pretrained(twin, directory / name, scheme="none")
    if world_rank() != 0:
        return {}
    found: dict[str, Any] = {"tensors": dict(read_tensors(directory / "live"))}
    if case.fp8_parameters and case.processes == 1:
        fp8 = {name for name, parameter in model.named_parameters() if is_fp8(parameter)}
        quantized = {id(parameter) for name, parameter in live.named_parameters() if name in fp8}
        walked = walk_parameters([live])
        found["parameters"] = {each.name: describe(each.tensor) for each in walked if id(each.tensor) in quantized}
    return {**found, **(read_blocks(directory) if in_blocks else {})}


def twin_of(bridge: AutoBridge, model: Any, case: Case, convert: Callable[[Tensor], Tensor]) -> Any:
    """A model of the case whose parameters are made of this one's."""
    twin = build(bridge.hf, case)
    sources = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, parameter in [*twin.named_parameters(), *twin.named_buffers()]:
            parameter.copy_(convert(sources[name]))
    return twin


def codes_of(parameter: Any) -> Tensor:
    """The bytes of a parameter in blocks as numbers, zeros of others.

    With them as parameters of a model, the export tells where they belong without any knowledge of blocks.
    """
    return parameter._rowwise_data.float() if is_fp8(parameter) else torch.zeros_like(parameter)


def scales_of(parameter: Any) -> Tensor:
    """The scale of each element, as numbers like `codes_of`."""
    if not is_fp8(parameter):
        return torch.zeros_like(parameter)
    rows, columns = parameter.shape
    scales = parameter._rowwise_scale_inv[: -(-rows // BLOCK), : -(-columns // BLOCK)]
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def read_blocks(directory: Path) -> dict[str, Any]:
    """`codes` and `scales` of `Expected`."""
    elements = load_file(directory / "scales" / "model.safetensors")
    numbers = load_file(directory / "codes" / "model.safetensors")
    quantized = [name for name in numbers if elements[name].any()]
    return {
        "codes": {name: describe(numbers[name].to(torch.uint8)) for name in quantized},
        "scales": {name: scale_of_each_block(elements[name]) for name in quantized},
    }


def scale_of_each_block(elements: Tensor) -> list[list[float]] | None:
    """`[out, in]` → `[out/128, in/128]`; None where a block has several."""
    sample = elements[::BLOCK, ::BLOCK].contiguous()
    whole = sample.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: elements.shape[0], : elements.shape[1]]
    result: list[list[float]] = sample.tolist()
    return result if torch.equal(whole, elements) else None


def read_tensors(directory: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is not a dictionary
                yield name, describe(file.get_tensor(name))


def differing(directory: Path, expected: dict[str, str]) -> list[str]:
    """Names of tensors that are not the expected ones, or in one of both only."""
    found = dict(read_tensors(directory))
    return [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]


def describe(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    shape = "×".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {hashlib.sha256(data).hexdigest()[:16]}"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("megatron-core", "nvidia-modelopt", "transformer_engine", "torch")}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
