"""Real Megatron ranks with AWQ on linears whose inputs another linear makes: o_proj after v, down after up.

    torchrun --nproc-per-node N live_row_vectors.py HF_DIR OUT_DIR SIZES_JSON

For each case: a live export, the checkpoint, the logits of the quantized model, and at TP=1 the fake-quantized weight
and the vector of each Hugging Face weight; or report.json with the refusal.
Experts' up and gate projections, but for one case, get their inputs as they are, since a router reads the same.
"""

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
from modelopt.torch.quantization.model_calib import disable_pre_quant_scale_and_resmooth  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.mappings.errors import UsageError  # noqa: E402
from tests.workers.live_awq import oracle  # noqa: E402
from tests.workers.model import forward  # noqa: E402

PLAIN = ("*linear_qkv*", "*linear_fc1*")
WITH_CACHE = {**mtq.INT4_AWQ_CFG, "quant_cfg": [*mtq.INT4_AWQ_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]}
CASES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "int4_awq": (mtq.INT4_AWQ_CFG, ()),
    "after_plain": (mtq.INT4_AWQ_CFG, PLAIN),
    "nvfp4_awq": (mtq.NVFP4_AWQ_LITE_CFG, ()),
    "with_cache": (WITH_CACHE, ("*linear_fc*",)),
    "experts_in": (mtq.INT4_AWQ_CFG, ()),
}
"""A preset of ModelOpt, and the quantizers that are disabled."""


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    refused = {}
    with megatron.distributed(**sizes):
        for case, (preset, disabled) in CASES.items():
            model = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            config = copy.deepcopy(preset)
            config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in disabled]
            with megatron.cache_quantizers():
                mtq.quantize(model, config, forward)
            model.bfloat16()
            if case != "experts_in":
                unsmooth_experts(model)
            try:
                bridge.save_hf_pretrained(model, out / case, scheme="auto")
            except UsageError as error:
                refused[case] = str(error)
                continue
            megatron.save_checkpoint(model, out / f"checkpoint_{case}", iteration=1)
            weights = oracle(bridge, model) if sizes.get("tp", 1) == 1 else {}
            save_file({**weights, "logits": forward(model).contiguous()}, out / f"{case}.safetensors")
        (out / "report.json").write_text(json.dumps(refused))


def unsmooth_experts(model: Any) -> None:
    """Takes the vectors from experts' first linears, by ModelOpt's own function, and calibrates their weights again."""
    for name, linear in model.named_modules():
        if ".experts." in name and name.endswith("linear_fc1") and linear.input_quantizer.pre_quant_scale is not None:
            disable_pre_quant_scale_and_resmooth(linear, delete_pre_quant_scale=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
