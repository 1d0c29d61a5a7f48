"""Real Megatron ranks with NVFP4 quantizers whose blocks have calibrated or learned amax.

    torchrun --nproc-per-node N live_static_blocks.py HF_DIR OUT_DIR SIZES_JSON

For each case: the checkpoint, the live export, and at TP=1 an oracle by Hugging Face names, CASE.safetensors: what
ModelOpt's fake quantizer makes of each weight, and the codes and scales of ModelOpt's exporter where it has any.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import StaticBlockScaleQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_quantizers
from tests.workers.legacy_save import save_legacy
from tests.workers.model import forward

BLOCK = 16
GLOBAL = 1.2718281  # of every quantizer and rank: above all weights, and such that no scale lies between two of E4M3


def inserted(model: Any, *, inputs: bool = True, four_over_six: bool = False) -> Iterator[tuple[Any, Tensor]]:
    """Inserts static quantizers. Yields each weight quantizer and its weight, with the amax of max calibration.

    Half of the blocks have their amax times 1.5, as a calibration of four-over-six that chose 4 there.
    """
    config = copy.deepcopy(mtq.NVFP4_FOUR_OVER_SIX_CFG if four_over_six else mtq.NVFP4_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer" and entry.get("cfg"):
            entry["cfg"]["block_sizes"]["type"] = "static"
        if entry["quantizer_name"] == "*input_quantizer" and not inputs:
            entry["enable"] = False
    mtq.quantize(model, {**config, "algorithm": None})
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        weight = module.weight.detach()
        amax = weight.float().abs().reshape(-1, BLOCK).amax(1, keepdim=True)
        chosen = torch.where(hashed(amax) % 2 == 0, amax * 1.5, amax)
        quantizer.amax = chosen if four_over_six else amax
        StaticBlockScaleQuantizer.from_tensor_quantizer(quantizer, torch.tensor(GLOBAL))
        if inputs:
            module.input_quantizer.amax = torch.tensor(3.0)
        yield quantizer, weight


def hashed(amax: Tensor) -> Tensor:
    """A number for each amax, however blocks are spread over ranks."""
    return (amax * 10_000).long()


def four_over_six(model: Any, *, inputs: bool = True) -> None:
    for _ in inserted(model, inputs=inputs, four_over_six=True):
        pass


def learned(model: Any, **settings: Any) -> None:
    """LSQ, whose amax have moved: up, down, below zero and below what E4M3 can say."""
    for quantizer, _ in inserted(model):
        quantizer.enable_lsq(**settings)
        for number, name in enumerate(("_amax_post", "_amax_pre")):
            amax = getattr(quantizer, name, None)
            if amax is not None:
                moved = amax * (1 + 0.2 * torch.sin(amax * 1000 + number))
                moved = torch.where(hashed(amax) % 31 == 0, -0.01, moved)
                amax.data.copy_(torch.where(hashed(amax) % 31 == 1, 1e-6, moved))


def calibrated(config: Any) -> Callable[[Any], None]:
    return lambda model: mtq.quantize(model, copy.deepcopy(config), forward)


ANYWHERE: dict[str, Callable[[Any], None]] = {
    "four_over_six": four_over_six,
    "four_over_six_a16": lambda model: four_over_six(model, inputs=False),
    "lsq": learned,
    "lsq_tied": lambda model: learned(model, tied_amax=True, dtype=torch.bfloat16),
    "dual_lsq": lambda model: learned(model, learnable_amax=["pre", "post"]),
    "dual_lsq_unrounded": lambda model: learned(model, learnable_amax=["pre", "post"], quantize_pre_scale=False),
}
ONE_RANK: dict[str, Callable[[Any], None]] = {  # ModelOpt calibrates static blocks at TP=1 only
    "mse_four_over_six": calibrated(mtq.NVFP4_FOUR_OVER_SIX_CFG),
    "mse_sweep": calibrated(mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG),
}


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    alone = sizes.get("tp", 1) == 1
    with megatron.distributed(**sizes):
        for case, quantize in {**ANYWHERE, **(ONE_RANK if alone else {})}.items():
            model = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            quantize(model)
            oracle = made_by_modelopt(bridge, model)  # the first run also tells ModelOpt how to shard an amax
            if alone:
                save_file(oracle, out / f"{case}.safetensors")
            megatron.save_checkpoint(model, out / f"checkpoint_{case}", iteration=1)
            save_legacy(bridge.hf, [model], out / f"legacy_{case}")
            bridge.save_hf_pretrained(model, out / case, scheme="auto")


@torch.no_grad()
def made_by_modelopt(bridge: AutoBridge, model: Any) -> dict[str, Tensor]:
    """What ModelOpt makes of each weight, by Hugging Face name."""
    made: dict[str, Tensor] = {}
    modules = {id(each.weight_quantizer): each for each in model.modules() if hasattr(each, "weight_quantizer")}
    for each in walk_quantizers([model]):
        if "weight_quantizer" not in each.name:
            continue
        quantizer, weight = each.module, modules[id(each.module)].weight.detach()
        tensors = {"fake": quantizer(weight)}
        if not quantizer._lsq:
            scale, factor = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, weight)
            codes = NVFP4QTensor.quantize(weight, BLOCK, scale, factor)[0]._quantized_data
            tensors |= {"packed": codes, "scale": scale.view(torch.uint8), "factor": factor.expand(len(weight), 1)}
        name = each.name.replace(".weight_quantizer.", ".weight").replace(".weight_quantizer", ".weight")
        mapping = bridge.hf.registry.megatron_to_hf_lookup(name)
        assert mapping is not None, name
        for kind, tensor in tensors.items():
            joined = mapping.join([tensor], bridge.hf.model_config)
            made |= {f"{target}.{kind}": part.contiguous() for target, part in joined.items()}
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
