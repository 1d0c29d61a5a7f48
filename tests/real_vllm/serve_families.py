"""Loads a family's tiny model in vLLM, in its environment: plain and quantized. Compares log-probabilities.

    python serve_families.py MADE_DIR OUT_JSON

MADE_DIR is what `families.py` made. Where vLLM has no kernel for a CPU the model is loaded all the same (`unchecked`),
into parameters full of NaN: those that stay NaN were not loaded.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import serve  # first: it sets the environment
import torch
from safetensors.torch import load_file
from torch import nn
from vllm import LLM
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.model_loader import register_model_loader
from vllm.platforms.interface import PlatformEnum

SCHEMES = ("none", "mxfp8", "nvfp4a16")
COMPUTED_BY_VLLM = (
    *("input_global_scale", "g_idx", "workspace", "prob_scale"),
    *(f"{each}_{kind}" for each in "qkv" for kind in ("scale", "zero_point")),
)


class Last:
    """What the last load left unfilled, and whether nothing more than loading was asked."""

    unfilled: list[str]
    only_load: bool


@register_model_loader("filled")
class FillingLoader(serve.LoaderIntoNaN):
    """Notes which parameters were not loaded."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)
        Last.unfilled = [
            name
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and bool(parameter.float().isnan().any())
            if not name.endswith(COMPUTED_BY_VLLM)
        ]
        if Last.only_load:
            raise serve.Loaded


def main(made: Path, out: Path) -> None:
    register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    torch.distributed.destroy_process_group = lambda group=None: None  # as in serve.py
    found = []
    [architecture] = json.loads((made / "none" / "config.json").read_text())["architectures"]
    for scheme in SCHEMES:
        found.append({"architecture": architecture, "scheme": scheme, **examine(made, scheme)})
        print(json.dumps(found[-1]), flush=True)
        gc.collect()
    out.write_text(json.dumps(found))


def examine(directory: Path, scheme: str) -> dict[str, Any]:
    checkpoint, reference, refused = (directory / f"{scheme}{end}" for end in ("", ".safetensors", ".txt"))
    if not checkpoint.exists():
        return {"refused": refused.read_text()}
    found: dict[str, Any] = {}
    if reference.exists():
        Last.only_load = False
        try:
            logprobs = serve.serve(checkpoint, "float32", load_file(reference), load_format="filled")["logprobs"]
            return {"loaded": True, "unfilled": Last.unfilled, "mean": logprobs["mean"], "largest": logprobs["largest"]}
        except Exception as error:
            found["no kernel"] = serve.reason(error)
    gc.collect()
    Last.only_load, Last.unfilled = True, []
    backend = "triton" if scheme == "none" else "marlin"
    try:
        with serve.unchecked():
            LLM(**serve.arguments(checkpoint, "bfloat16", load_format="filled", moe_backend=backend))
    except serve.Loaded:
        return {**found, "loaded": True, "unfilled": Last.unfilled}
    except Exception as error:
        return {**found, "why": serve.reason(error)}
    raise AssertionError("the loader ends a load")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
