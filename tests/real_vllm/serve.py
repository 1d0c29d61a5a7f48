"""Loads exported checkpoints in vLLM, compares what it holds and what it computes. Runs in vLLM's environment.

    python serve.py MADE_DIR OUT_JSON                              # one process
    torchrun --nproc-per-node 2 serve.py MADE_DIR OUT_JSON         # TP=2 over gloo

MADE_DIR is what `prepare.py` made. Every checkpoint goes through vLLM's engine. Where vLLM has no kernel for a CPU the
reason is noted, and the checkpoint is loaded all the same, with its check of the device answered for it (`unchecked`):
what is loaded is then compared, and nothing is computed.
"""

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from held import computed, dequantized, fill_with_nan, held_tensors, part_of, shards_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mxfp4.emulation import EmulationMxfp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms.interface import PlatformEnum

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
DTYPES = ("float32", "bfloat16")
GENERATED = 4


class Loaded(Exception):
    """Raised once a model is loaded: nothing more is asked of it."""


class Held:
    """What the last load held."""

    tensors: dict[str, Tensor]
    computed: dict[str, Tensor]
    model: nn.Module
    only_load: bool


class LoaderIntoNaN(DefaultModelLoader):
    """vLLM's loader into parameters full of NaN."""

    def __init__(self, load_config: Any) -> None:
        load_config.load_format = "safetensors"
        super().__init__(load_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        fill_with_nan(model)
        super().load_weights(model, model_config)


@register_model_loader("watched")
class WatchedLoader(LoaderIntoNaN):
    """Notes what parameters hold before kernels repack them, and after."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)
        Held.model, Held.computed = model, {}
        Held.tensors = {name: tensor.clone() for name, tensor in held_tensors(model)}
        if Held.only_load:
            raise Loaded

    def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().load_model(*args, **kwargs)
        for name, layer in model.named_modules():
            if isinstance(layer, LinearBase) and hasattr(layer, "scheme"):
                shards = shards_of(name)
                Held.computed |= {shard: computed(layer, number) for number, shard in enumerate(shards)}
        return model


def main(made: Path, out: Path) -> None:
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    register_linear_kernel(EmulationMxfp4LinearKernel, PlatformEnum.CPU, "mxfp4")
    register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    # A group that replaces another of its name finds that one's ports in the launcher's store. So groups stay.
    torch.distributed.destroy_process_group = lambda group=None: None
    found = []
    for model in ("dense", "moe"):
        references = sorted(file for file in (made / model).glob("*.safetensors") if ".tp" not in file.name)
        work = [(file, DTYPES) for file in references] + [(made / model / "none.safetensors", DTYPES[1:])]
        for reference, dtypes in work:
            case = {"model": model, "scheme": reference.stem, "tp": WORLD, "rank": RANK}
            if fnmatch(f"{model}/{reference.stem}", os.environ.get("ONLY", "*")):
                found.append(case | examine(made / model, reference, dtypes))
                print(json.dumps(found[-1]), flush=True)
    everywhere = [found]
    if WORLD > 1:
        everywhere = everywhere * WORLD
        torch.distributed.all_gather_object(everywhere, found)
    if RANK == 0:
        out.write_text(json.dumps([case for of_rank in everywhere for case in of_rank], indent=1))


def examine(directory: Path, reference: Path, dtypes: Sequence[str]) -> dict[str, Any]:
    """One checkpoint, computed in the first of the dtypes for which there is a kernel."""
    checkpoint, expected = directory / reference.stem, load_file(reference)
    at_this_size = directory / f"{reference.stem}.tp{WORLD}.safetensors"
    if at_this_size.exists():
        expected["logits"] = load_file(at_this_size)["logits"]
    Held.tensors, Held.only_load = {}, False
    found: dict[str, Any] = {}
    for dtype in dtypes:
        try:
            found |= {"dtype": dtype, **serve(checkpoint, dtype, expected)}
            break
        except Exception as error:
            found[dtype] = reason(error)
    else:
        Held.only_load = True
        try:
            with unchecked():
                LLM(**arguments(checkpoint, "bfloat16", moe_backend="triton" if reference.stem == "w8a8" else "marlin"))
        except Loaded:
            pass
        except Exception as error:
            found["refused"] = reason(error)
        found["dtype"] = "bfloat16"
    gc.collect()
    return found | compare(checkpoint, expected, load_file(directory / "none" / "model.safetensors"))


def reason(error: Exception) -> str:
    if os.environ.get("DEBUG"):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """vLLM without its checks of whether this machine has a kernel: to create and fill a model that cannot run."""
    yes = (True, None)
    with (
        patch.object(CPUFp8BlockScaledMMKernel, "is_supported", classmethod(lambda *_: yes)),
        patch.object(MarlinNvFp4LinearKernel, "is_supported", classmethod(lambda *_: yes)),
        patch.object(EmulationMxfp4LinearKernel, "can_implement", classmethod(lambda *_: yes)),
        patch.object(FusedMoEExperts, "is_supported_config", staticmethod(lambda *_: yes)),
    ):
        yield


def serve(checkpoint: Path, dtype: str, expected: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """Log-probabilities of all tokens of the vocabulary after each token of the prompts, and what comes next."""
    llm = LLM(**arguments(checkpoint, dtype, **more))
    prompts = [{"prompt_token_ids": row.tolist()} for row in expected["tokens"]]
    sampling = SamplingParams(temperature=0, max_tokens=GENERATED, prompt_logprobs=-1, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    wanted = expected["logits"].log_softmax(-1)[:, :-1]
    found = torch.full_like(wanted, float("nan"))
    for row, output in enumerate(outputs):
        for position, entries in enumerate(output.prompt_logprobs[1:]):
            for token, entry in entries.items():
                found[row, position, token] = entry.logprob
    first = [output.outputs[0].token_ids[0] for output in outputs]
    difference = (found - wanted).abs()
    del llm
    return {
        "logprobs": {
            "mean": float(difference.mean()),
            "largest": float(difference.max()),
            "a tenth": float(difference.mean(-1).quantile(0.1)),  # of the tokens
        },
        "next tokens": first == expected["logits"][:, -1].argmax(-1).tolist(),
    }


def arguments(checkpoint: Path, dtype: str, **more: Any) -> dict[str, Any]:
    return {
        "model": str(checkpoint),
        "load_format": "watched",
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_logprobs": -1,
        "seed": 0,
        "enable_prefix_caching": False,
        "tensor_parallel_size": WORLD,
        "distributed_executor_backend": "external_launcher" if WORLD > 1 else "uni",
        **more,
    }


def compare(checkpoint: Path, expected: dict[str, Tensor], source: dict[str, Tensor]) -> dict[str, Any]:
    """What is held against the checkpoint's bytes, our dequantization and the source."""
    if not Held.tensors:
        return {"loaded": False}
    stored: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("weight_shape")}
    parts = {name: part_of(name, tensor, RANK, WORLD, Held.model) for name, tensor in stored.items()}
    held = Held.tensors
    nan = [name for name, tensor in held.items() if name in parts and bool(tensor.float().isnan().any())]
    differ = [name for name in parts if name in held and not same(held[name], parts[name])]
    result: dict[str, Any] = {
        "loaded": True,
        "tensors": len(parts),
        "not held": sorted(parts.keys() - held.keys()),
        "not stored": sorted(held.keys() - parts.keys()),
        "nan": nan,
        "differ": differ,
        "cast": sorted(
            {f"{parts[n].dtype} → {held[n].dtype}" for n in parts if n in held and held[n].dtype != parts[n].dtype}
        ),
    }
    modules = [name for name in expected if name not in ("tokens", "logits")]
    errors: dict[str, list[float]] = {"ours": [], "source": [], "computed": []}
    for module in modules:
        weight = dequantized(module, held)
        ours, original = (
            part_of(f"{module}.weight", tensor, RANK, WORLD, Held.model)
            for tensor in (expected[module], source[f"{module}.weight"])
        )
        errors["ours"].append(float(((weight.to(ours.dtype) - ours).abs() / ours.abs().clamp(min=1e-30)).max()))
        errors["source"].append(float((weight - original.float()).norm() / original.float().norm()))
        if module in Held.computed:
            errors["computed"].append(float((Held.computed[module] - weight).abs().max() / weight.abs().max()))
    return result | {"weights": len(modules), **{kind: max(each) for kind, each in errors.items() if each}}


def same(held: Tensor, part: Tensor) -> bool:
    return held.numel() == part.numel() and torch.equal(
        held.contiguous().view(torch.uint8).flatten(), part.to(held.dtype).contiguous().view(torch.uint8).flatten()
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
