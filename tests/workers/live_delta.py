"""Real Megatron ranks that load a Hugging Face Qwen3-Next with an MTP layer, quantize it with ModelOpt and export it.

    torchrun --nproc-per-node N live_delta.py HF_DIR OUT_DIR SIZES_JSON

As live_mla.py, for gated delta nets. A topology of one pipeline stage also exports FP8 with a scale for each row, as
ModelOpt calibrates it. TP=2 alone saves both as checkpoints.
"""

import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq

from amaxbridge.bridge import AutoBridge, megatron
from tests.support.without_fla import without_fla
from tests.workers.live_mla import load, quantize_mtp_layers
from tests.workers.live_moe import insert_quantizers, mirror_amax, set_amax_from_names
from tests.workers.model import calibrate


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes), without_fla():
        chunks = load(bridge)
        bridge.save_hf_pretrained(chunks, out / "plain", scheme="none")
        for chunk in chunks:
            insert_quantizers(chunk)
        set_amax_from_names(chunks)
        quantize_mtp_layers(chunks)
        bridge.save_hf_pretrained(chunks, out / "nvfp4", max_shard_bytes=60_000)
        if sizes == {"tp": 2}:
            megatron.save_checkpoint(chunks[0], out / "checkpoint", iteration=3)
        mirror_amax(bridge, chunks)
        bridge.save_hf_pretrained(chunks, out / "mirrored", max_shard_bytes=60_000)
        if sizes.get("pp", 1) > 1:
            return
        (model,) = load(bridge)
        mtq.quantize(model, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, calibrate)
        model.bfloat16()
        bridge.save_hf_pretrained(model, out / "fp8", scheme="fp8_dynamic", max_shard_bytes=60_000)
        if sizes == {"tp": 2}:
            megatron.save_checkpoint(model, out / "fp8_checkpoint", iteration=3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
