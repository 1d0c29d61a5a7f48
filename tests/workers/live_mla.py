"""Real Megatron ranks that load a Hugging Face DeepSeek-V3, quantize it with ModelOpt and export it.

    torchrun --nproc-per-node N live_mla.py HF_DIR OUT_DIR SIZES_JSON

As live_moe.py, for latent attention, shared experts, router biases and layers for multi-token prediction. TP=2 alone
saves a checkpoint. The logits are noted from a model of their own, because one that goes to fp32 and back loses bits of
its router biases.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_quantizers
from tests.workers.live_moe import insert_quantizers, mirror_amax, save_logits, set_amax_from_names


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        chunks = load(bridge)
        bridge.save_hf_pretrained(chunks, out / "plain", scheme="none")
        for chunk in chunks:
            insert_quantizers(chunk)
        set_amax_from_names(chunks)
        bridge.save_hf_pretrained(chunks, out / "nvfp4", max_shard_bytes=60_000)
        if sizes == {"tp": 2}:
            megatron.save_checkpoint(chunks[0], out / "checkpoint", iteration=3)
        quantize_mtp_layers(chunks)
        bridge.save_hf_pretrained(chunks, out / "nvfp4_mtp", max_shard_bytes=60_000)
        mirror_amax(bridge, chunks)
        bridge.save_hf_pretrained(chunks, out / "mirrored", max_shard_bytes=60_000)
        if sizes == {"tp": 1}:
            save_logits(load(bridge)[0], out / "logits.pt")


def load(bridge: AutoBridge) -> list[Any]:
    chunks = megatron.build_chunks(bridge.hf)
    bridge.load_hf_weights(chunks)
    return chunks


def quantize_mtp_layers(chunks: list[Any]) -> None:
    """ModelOpt's default leaves them as they are. Amax from names as for the decoder; nothing where there are none."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if name.startswith("mtp.") and name.endswith(("weight_quantizer", "input_quantizer")):
                module.enable() if "router" not in name else module.disable()
    for quantizer in walk_quantizers(chunks):
        if quantizer.name.startswith("mtp."):
            digest = hashlib.sha256(quantizer.name.encode()).digest()
            quantizer.module._buffers.pop("_amax", None)
            quantizer.module.amax = torch.tensor(0.25 + int.from_bytes(digest[:3], "little") / 2**24)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
