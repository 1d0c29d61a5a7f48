"""A real Megatron rank whose ModelOpt quantizers have settings that no export writes.

    torchrun --nproc-per-node 1 live_refused.py HF_DIR OUT_DIR SIZES_JSON

report.json has, for each case, what the exports raised: live and from the checkpoint, with scheme=auto and scheme=none;
"written" if nothing.
"""

import contextlib
import copy
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.mappings.errors import AmaxbridgeError  # noqa: E402
from tests.workers.model import forward  # noqa: E402

FP8: Mapping[str, Any] = {"num_bits": (4, 3), "axis": None}
CACHES: Mapping[str, Mapping[str, Any]] = {
    "cache_int8_per_head": {"num_bits": 8, "axis": 2},
    "cache_per_token": {"num_bits": (4, 3), "block_sizes": {-1: None}, "type": "dynamic"},
    "cache_dynamic": {"num_bits": (4, 3), "axis": None, "type": "dynamic"},
    "cache_nvfp4": mtq.NVFP4_KV_CFG["quant_cfg"][0]["cfg"],
    "cache_int8": {"num_bits": 8, "axis": None},
}


def linear(model: Any) -> Any:
    return model.decoder.layers[0].mlp.linear_fc2


def attribute(model: Any) -> None:
    linear(model).weight_quantizer._of_tomorrow = 3


def attribute_of_a_disabled_one(model: Any) -> None:
    linear(model).output_quantizer._of_tomorrow = 3


def buffer(model: Any) -> None:
    linear(model).weight_quantizer.register_buffer("_of_tomorrow", torch.ones(3))


def buffer_of_a_disabled_one(model: Any) -> None:
    linear(model).output_quantizer.register_buffer("_of_tomorrow", torch.ones(3))


def parameter(model: Any) -> None:
    linear(model).input_quantizer.register_parameter("_of_tomorrow", nn.Parameter(torch.ones(3)))


def module_inside(model: Any) -> None:
    linear(model).input_quantizer.of_tomorrow = nn.Linear(2, 2, bias=False)


def bias(model: Any) -> None:
    linear(model).input_quantizer.register_buffer("_bias_value", torch.ones(1))


def rotation(model: Any) -> None:
    linear(model).weight_quantizer.set_from_attribute_config({**FP8, "rotate": True})


def rotation_of_a_disabled_one(model: Any) -> None:
    model.decoder.layers[0].self_attention.core_attention.q_bmm_quantizer.set_from_attribute_config({"rotate": True})


def compress(model: Any) -> None:
    mtq.compress(model)


def module_with_such_a_name(model: Any) -> None:
    """Not ModelOpt's: a weight that must not be taken for quantizer state."""
    linear(model).codebook_quantizer = nn.Linear(2, 2, bias=False)


CASES: Mapping[str, tuple[Any, Callable[[Any], None] | None]] = {
    **{
        each.__name__: (mtq.FP8_DEFAULT_CFG, each)
        for each in (
            attribute, attribute_of_a_disabled_one, buffer, buffer_of_a_disabled_one, parameter, module_inside, bias,
            rotation, rotation_of_a_disabled_one, module_with_such_a_name,
        )
    },
    "compress_int8": (mtq.INT8_WEIGHT_ONLY_CFG, compress),
    "svdquant": ({**mtq.NVFP4_SVDQUANT_DEFAULT_CFG, "algorithm": {"method": "svdquant", "lowrank": 4}}, None),
    **{
        name: (
            {
                **mtq.FP8_DEFAULT_CFG,
                "quant_cfg": [
                    *mtq.FP8_DEFAULT_CFG["quant_cfg"],
                    {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": dict(cache)},
                ],
            },
            None,
        )
        for name, cache in CACHES.items()
    },
}  # fmt: skip
"""A preset of ModelOpt, and what is done to the calibrated model."""


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict[str, str]] = {}
    with megatron.distributed(**sizes):
        for case, (preset, change) in CASES.items():
            model = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            with contextlib.suppress(TypeError), megatron.cache_quantizers():  # svdquant ends in one, with all in place
                mtq.quantize(model, copy.deepcopy(preset), forward)
            model.bfloat16()
            if change is not None:
                change(model)
            checkpoint = out / f"checkpoint_{case}"
            report[case] = {
                f"live {scheme}": raised(bridge.save_hf_pretrained, model, out / case, scheme=scheme)
                for scheme in ("auto", "none")
            }
            megatron.save_checkpoint(model, checkpoint, iteration=1)
            report[case] |= {
                f"stored {scheme}": raised(bridge.convert_checkpoint, checkpoint, out / case, scheme=scheme)
                for scheme in ("auto", "none")
            }
    (out / "report.json").write_text(json.dumps(report))


def raised(export: Callable[..., Any], *what: Any, scheme: str) -> str:
    try:
        export(*what, scheme=scheme, overwrite=True)
    except AmaxbridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "written"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
