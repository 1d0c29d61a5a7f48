"""Real Megatron ranks that are trained a few steps, with a refit after each that is held against a saved checkpoint.

    torchrun --nproc-per-node N live_planned_refit.py HF_DIR OUT_DIR SIZES_JSON

OUT_DIR/RANK.json: by scheme, for each step, a SHA-256 of every tensor that the refit yielded on this rank, and of every
tensor of the checkpoint that was saved right afterwards. `changes`: what refits said about a model that was changed.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors.torch import load_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_quantizers
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.bridge.live.refit import Refit
from amaxbridge.export.schemes import Groups, Recipe, find_scheme, has_group_size, named_scheme
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.workers.live_moe import insert_quantizers, set_amax_from_names

STEPS = 2
SCHEMES: dict[str, Any] = {
    "none": None,
    "w4a16": None,
    "mxfp4": None,
    "fp8_block": None,
    "nvfp4a16": None,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
}
"""Scheme → the settings of the quantizers that the model has; None for none, and a scheme that needs no data."""


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        report: dict[str, Any] = {scheme: list(compared(bridge, scheme, out)) for scheme in SCHEMES}
        report["changes"] = changes(bridge) if sizes == {"tp": 2} else {}
    (out / f"{world_rank()}.json").write_text(json.dumps(report))


def built(bridge: AutoBridge, scheme: str) -> list[Any]:
    """The model's chunks, with the quantizers of a scheme."""
    chunks: list[Any] = megatron.build_chunks(bridge.hf)
    bridge.load_hf_weights(chunks)
    for chunk in chunks if SCHEMES[scheme] is not None else []:
        insert_quantizers(chunk, SCHEMES[scheme])
    set_amax(chunks, scheme)
    return chunks


def recipe_of(scheme: str) -> Recipe | None:
    """The scheme, in groups of columns that divide the sizes of tiny models."""
    return find_scheme(Groups.of(named_scheme(scheme, 32)) if has_group_size(scheme) else scheme)


def set_amax(chunks: list[Any], scheme: str) -> None:
    set_amax_from_names(chunks)
    for quantizer in walk_quantizers(chunks) if scheme == "fp8_dynamic" else ():
        if "weight" not in quantizer.name:
            del quantizer.module._buffers["_amax"]
        else:
            rows = torch.arange(1, quantizer.rows + 1) / quantizer.rows
            quantizer.module._buffers["_amax"] = (quantizer.module.amax * rows)[:, None]


def compared(bridge: AutoBridge, scheme: str, out: Path) -> Iterator[dict[str, Any]]:
    """The tensors of each step, and those of the checkpoint."""
    chunks = built(bridge, scheme)
    optimizer = torch.optim.AdamW([each for chunk in chunks for each in chunk.parameters()], lr=1e-3)
    refit = Refit(bridge, chunks, scheme=recipe_of(scheme))
    addresses = dict[str, int]()
    for step in range(STEPS):
        train(chunks, optimizer, step)
        tensors = dict(refit.run())
        assert list(refit.owned) == [name for name in refit.specs if name in tensors]
        assert all(refit.specs[name].shape == tuple(tensor.shape) for name, tensor in tensors.items())
        assert all(refit.specs[name].dtype == tensor.dtype for name, tensor in tensors.items())
        digests = hashes(tensors)
        assert hashes(dict(bridge.export_hf_weights(chunks, scheme=recipe_of(scheme)))) == digests
        if step:
            moved = [name for name, at in addresses.items() if tensors[name].data_ptr() != at]
            assert all(name.endswith(("_shape", "k_scale", "v_scale")) for name in moved), moved[:5]
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        directory = out / f"{scheme}_{step}"
        bridge.save_hf_pretrained(chunks, directory, scheme=recipe_of(scheme) or scheme)
        saved = {}
        for path in directory.glob("*.safetensors"):
            saved |= hashes(load_file(path))
        yield {"run": digests, "saved": saved, "plans": refit.plans}


def train(chunks: list[Any], optimizer: torch.optim.Optimizer, step: int) -> None:
    """An optimizer's step, and other amax, as continued training has them; a different one on every rank."""
    generator = torch.Generator().manual_seed(100 * step + parallel_state.get_tensor_model_parallel_rank())
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()
    for quantizer in walk_quantizers(chunks):
        if isinstance(quantizer.module, TensorQuantizer) and hasattr(quantizer.module, "_amax"):
            quantizer.module.amax = quantizer.module.amax * (1.01 + 0.001 * world_rank())


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            f"{tensor.dtype} {list(tensor.shape)}".encode()
            + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def changes(bridge: AutoBridge) -> dict[str, Any]:
    """Changes to a model between two runs: what came of each."""
    return {name: outcome(bridge, change) for name, change in CHANGES.items()}


def outcome(bridge: AutoBridge, change: Callable[[Any], None]) -> dict[str, Any]:
    """What came of a change: are the bytes those of a new export? Or the message, if it was refused."""
    chunks = built(bridge, "nvfp4")
    refit = Refit(bridge, chunks, scheme="nvfp4")
    before = hashes(dict(refit.run()))
    change(chunks[0])
    try:
        after = hashes(dict(refit.run()))
    except AmaxbridgeError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    fresh = hashes(dict(bridge.export_hf_weights(chunks, scheme="nvfp4")))
    return {"right": after == fresh, "differs": after != before, "plans": refit.plans}


def _other_storage(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def _other_parameter(model: Any) -> None:
    linear = model.decoder.layers[1].mlp.linear_fc1
    linear.weight = torch.nn.Parameter(linear.weight.data * 1.5)


def _other_module(model: Any) -> None:
    """On one rank alone."""
    if world_rank() == 1:
        norm = torch.nn.RMSNorm(64)
        norm.weight.data = model.decoder.final_layernorm.weight.data * 0.5
        model.decoder.final_layernorm = norm.bfloat16()
    else:
        model.decoder.final_layernorm.weight.data *= 0.5


def _other_rows(model: Any) -> None:
    linear = model.decoder.layers[0].mlp.linear_fc2
    linear.weight.data = torch.zeros(linear.weight.shape[0], linear.weight.shape[1] * 2, dtype=torch.bfloat16)


def _disabled(model: Any) -> None:
    model.decoder.layers[0].mlp.linear_fc1.weight_quantizer.disable()


def _block_sizes_in_place(model: Any) -> None:
    quantizer = model.decoder.layers[0].mlp.linear_fc1.weight_quantizer
    quantizer._block_sizes[-1] = 32


def _rotated(model: Any) -> None:
    model.decoder.layers[0].mlp.linear_fc1.input_quantizer._rotate = True


def _zero_amax(model: Any) -> None:
    model.decoder.layers[0].mlp.linear_fc1.input_quantizer._amax.zero_()


def _no_amax(model: Any) -> None:
    model.decoder.layers[0].mlp.linear_fc1.input_quantizer.reset_amax()


def _nan_amax_on_one_rank(model: Any) -> None:
    if world_rank() == 1:
        model.decoder.layers[0].mlp.linear_fc1.input_quantizer._amax.fill_(torch.nan)


def _replaced_amax(model: Any) -> None:
    quantizer = model.decoder.layers[0].mlp.linear_fc1.input_quantizer
    quantizer._buffers["_amax"] = quantizer._amax * 3


def _back_and_forth(model: Any) -> None:
    """Calibration's switches, and the modes of a module, have no effect in the end."""
    model.eval()
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.enable_calib()
            module.disable_calib()
            module._input_dtype = torch.bfloat16
    model.train()


CHANGES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda model: None,
    "other storage": _other_storage,
    "other parameter": _other_parameter,
    "other module": _other_module,
    "other rows": _other_rows,
    "disabled": _disabled,
    "block sizes in place": _block_sizes_in_place,
    "rotated": _rotated,
    "zero amax": _zero_amax,
    "no amax": _no_amax,
    "NaN amax on one rank": _nan_amax_on_one_rank,
    "replaced amax": _replaced_amax,
    "back and forth": _back_and_forth,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
