"""Real Megatron ranks that collect the quantizer state of every granularity that ModelOpt has.

    torchrun --nproc-per-node N live_granularity.py HF_DIR OUT_DIR TP

Each rank leaves what it got as OUT_DIR/CASE_RANK.pt; together the ranks have the whole state.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_quantizers
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.mappings.errors import UsageError
from tests.workers.model import forward


def static_blocks(model: Any) -> None:
    """Per-block NVFP4 amax set by hand: it cannot be calibrated on a CPU."""
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"]["type"] = "static"
    mtq.quantize(model, {**config, "algorithm": None})
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            quantizer.amax = module.weight.detach().float().abs().reshape(-1, 16).amax(1, keepdim=True)
            module.input_quantizer.amax = torch.tensor(3.0)


def configured(config: Any) -> Callable[[Any], None]:
    return lambda model: mtq.quantize(model, config, forward)


CASES: dict[str, Callable[[Any], None]] = {
    "fp8_per_channel": configured(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
    "int8_per_channel": configured(mtq.INT8_DEFAULT_CFG),
    "smoothquant": configured(mtq.INT8_SMOOTHQUANT_CFG),
    "nvfp4_static": static_blocks,
}


def main(hf: Path, out: Path, tp: int) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(tp=tp):
        for case, quantize in CASES.items():
            model = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            quantize(model)
            state = bridge.collect_quant_state(model)
            torch.save(dict(state.amax), out / f"{case}_{world_rank()}.pt")
            enabled = sum(1 for _ in walk_quantizers([model]))
            print(case, "quantizers", enabled, "values", len(state.amax), "missing", sorted(state.missing)[:4])
            if case == "smoothquant":
                bridge.save_hf_pretrained(model, out / "folded", scheme="none")
                try:
                    bridge.save_hf_pretrained(model, out / "refused", scheme="none", quant_state=True)
                except UsageError as error:
                    (out / "refused.txt").write_text(str(error))
            if case == "nvfp4_static":
                bridge.save_hf_pretrained(model, out / "static")
                bridge.save_hf_pretrained(model, out / "plain", scheme="none", quant_state=True)
                mirrored = megatron.build_model(bridge.hf)
                bridge.load_hf_weights(mirrored)
                quantize(mirrored)
                for quantizer in walk_quantizers([mirrored]):
                    quantizer.module.amax = torch.zeros_like(quantizer.module.amax)
                bridge.load_quant_state(mirrored, state if tp == 1 else whole(state, bridge))
                bridge.save_hf_pretrained(mirrored, out / "mirrored")


def whole(state: Any, bridge: AutoBridge) -> Any:
    """Joins the ranks' states; per-channel and per-block values lie on their owners."""
    from dataclasses import replace

    from amaxbridge.bridge.live.process_ranks import current_ranks
    from amaxbridge.mappings.ranks import Axis

    parts = current_ranks().all_gather_object(Axis.WORLD, dict(state.amax))
    return replace(state, amax={name: value for part in parts for name, value in part.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
