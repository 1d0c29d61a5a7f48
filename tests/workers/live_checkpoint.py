"""Real Megatron ranks that save a model in the forms that distributed checkpoints have, and export it live.

    torchrun --nproc-per-node N live_checkpoint.py HF_DIR OUT_DIR SIZES_JSON

`plain` is not quantized, `nvfp4` has a per-tensor amax made from each quantizer's name, `channels` has FP8 quantizers
with a per-channel amax of their weights' own rows. For each: the checkpoint, in `legacy_…` the same as a pickle of each
rank, and in `live_…` what the model exports.
"""

import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_quantizers
from tests.workers.legacy_save import save_legacy
from tests.workers.live_moe import insert_quantizers, set_amax_from_names


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        save(bridge, model, out, "plain", "none")
        insert_quantizers(model)
        set_amax_from_names([model])
        save(bridge, model, out, "nvfp4", "nvfp4")
        if sizes.get("ep", 1) == 1:
            channels = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(channels)
            mtq.quantize(channels, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
            amax_of_each_row(channels)
            save(bridge, channels, out, "channels", "fp8_dynamic")


def amax_of_each_row(model: Any) -> None:
    """Per-row amax where ranks hold whole rows; else one number, which does not depend on the cut."""
    modules = dict(model.named_modules())
    for quantizer in walk_quantizers([model]):
        if "weight_quantizer" not in quantizer.name:
            continue
        owner = next(each for each in modules.values() if getattr(each, "weight_quantizer", None) is quantizer.module)
        amax = owner.weight.abs().amax(dim=1, keepdim=True).float()
        row_parallel = getattr(owner.weight, "partition_dim", -1) == 1
        quantizer.module.amax = torch.full_like(amax, 2.0) if row_parallel else amax


def save(bridge: AutoBridge, model: Any, out: Path, form: str, scheme: str) -> None:
    megatron.save_checkpoint(model, out / form, iteration=7)
    save_legacy(bridge.hf, [model], out / f"legacy_{form}")
    bridge.save_hf_pretrained(model, out / f"live_{form}", scheme=scheme, max_shard_bytes=60_000)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
