"""Real Megatron ranks with AWQ and SmoothQuant: input quantizers that multiply inputs, enabled or not.

    torchrun --nproc-per-node N live_awq.py HF_DIR OUT_DIR SIZES_JSON

For each case: the checkpoint, live exports of all modules but those without a norm before them, what an export of
those too raises, and at TP=1 the logits of the quantized model and an oracle, CASE.safetensors: the fake-quantized
weight and the vector of each Hugging Face weight.
"""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import SequentialQuantizer
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_all_quantizers
from amaxbridge.mappings.errors import UsageError
from tests.workers.model import forward

CASES = {
    "int4_awq": mtq.INT4_AWQ_CFG, "nvfp4_awq_lite": mtq.NVFP4_AWQ_LITE_CFG, "int4_awq_fp8_inputs": mtq.INT4_AWQ_CFG
}  # fmt: skip
FP8_PER_TOKEN: dict[str, Any] = {"num_bits": (4, 3), "block_sizes": {-1: None}, "type": "dynamic"}
"""Inputs of the last case, set afterwards: ModelOpt's AWQ does not calibrate with them."""
WITHOUT_NORM = ("*linear_proj*", "*linear_fc2*")


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    alone = sizes.get("tp", 1) == 1
    with megatron.distributed(**sizes):
        for case, preset in CASES.items():
            whole = calibrated(bridge, preset, (), case)
            ignore = ["re:.*o_proj", "re:.*down_proj"]
            bridge.save_hf_pretrained(whole, out / f"{case}_ignoring", scheme="auto", ignore=ignore)
            bridge.save_hf_pretrained(whole, out / f"{case}_plain", scheme="none")
            if alone:
                (out / f"{case}.txt").write_text(refusal(bridge, whole, out))
            model = calibrated(bridge, preset, WITHOUT_NORM, case)
            bridge.save_hf_pretrained(model, out / case, scheme="auto")
            megatron.save_checkpoint(model, out / f"checkpoint_{case}", iteration=1)
            if alone:
                save_file({**oracle(bridge, model), "logits": forward(model)}, out / f"{case}.safetensors")
        model = calibrated(bridge, mtq.W4A8_AWQ_BETA_CFG, (), "w4a8")
        bridge.save_hf_pretrained(model, out / "w4a8_plain", scheme="none")
        megatron.save_checkpoint(model, out / "checkpoint_w4a8", iteration=1)
        if alone:
            (out / "w4a8.txt").write_text(refusal(bridge, model, out))
            save_file(stages(model), out / "w4a8.safetensors")


def calibrated(bridge: AutoBridge, preset: Any, disabled: tuple[str, ...], case: str) -> Any:
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    config = copy.deepcopy(preset)
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in disabled]
    mtq.quantize(model, config, forward)
    if case.endswith("fp8_inputs"):
        inputs = [{"quantizer_name": "*linear_*.input_quantizer", "cfg": FP8_PER_TOKEN}]
        off = [{"quantizer_name": name, "enable": False} for name in disabled]
        mtq.set_quantizer_by_cfg(model, [*inputs, *off])
    return model.bfloat16()


@torch.no_grad()
def stages(model: Any) -> dict[str, Tensor]:
    """Weights after the first stage of their quantizers, and after both."""
    made: dict[str, Tensor] = {}
    for name, linear in model.named_modules():
        chain = getattr(linear, "weight_quantizer", None)
        if isinstance(chain, SequentialQuantizer) and chain[0].is_enabled:
            made |= {f"{name}.first": chain[0](linear.weight), f"{name}.both": chain(linear.weight)}
    return made


def refusal(bridge: AutoBridge, model: Any, out: Path) -> str:
    try:
        bridge.save_hf_pretrained(model, out / "refused", scheme="auto")
    except UsageError as error:
        return str(error)
    return "written"


@torch.no_grad()
def oracle(bridge: AutoBridge, model: Any) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    modules = {id(each.weight_quantizer): each for each in model.modules() if hasattr(each, "weight_quantizer")}
    for each in walk_all_quantizers([model]):
        name = re.sub(r"\.weight_quantizer(\.(\d+))?$", lambda found: f".weight{found[2] or ''}", each.name)
        mapping = bridge.hf.registry.megatron_to_hf_lookup(name)
        if mapping is None or ".weight_quantizer" not in each.name or not each.module.is_enabled:
            continue
        linear = modules[id(each.module)]
        for name, weight in mapping.join([each.module(linear.weight)], bridge.hf.model_config).items():
            made[f"{name}.fake"] = weight.contiguous()
            if linear.input_quantizer.pre_quant_scale is not None:
                made[f"{name}.vector"] = linear.input_quantizer.pre_quant_scale.flatten().clone()
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
