"""Real Megatron ranks that load a Hugging Face model into a HybridModel, quantize it with ModelOpt and export it.

    torchrun --nproc-per-node N live_hybrid.py HF_DIR OUT_DIR SIZES_JSON

As `live_moe.py`, with the same amax, and saves a checkpoint. One process also loads it into a new model and exports
that, and notes what is refused.
"""

import json
import sys
from pathlib import Path
from typing import Any

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.workers.live_moe import insert_quantizers, mirror_amax, set_amax_from_names


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        chunks = megatron.build_chunks(bridge.hf, model_class="hybrid")
        bridge.load_hf_weights(chunks)
        bridge.save_hf_pretrained(chunks, out / "plain", scheme="none")
        for chunk in chunks:
            insert_quantizers(chunk)
        set_amax_from_names(chunks, parts=1 if "M" in chunks[0].hybrid_layer_pattern else 2)
        bridge.save_hf_pretrained(chunks, out / "nvfp4", max_shard_bytes=60_000)
        mirror_amax(bridge, chunks)
        bridge.save_hf_pretrained(chunks, out / "mirrored", max_shard_bytes=60_000)
        if "vpp" in sizes or min(sizes["tp"], sizes.get("ep", 1)) > 1:  # ModelOpt does not save its state there
            return
        directory = megatron.save_checkpoint(chunks, out / "checkpoint", iteration=5)
        if sizes == {"tp": 1}:
            loaded = megatron.build_model(bridge.hf, model_class="hybrid")
            megatron.load_checkpoint(loaded, directory)
            bridge.save_hf_pretrained(loaded, out / "loaded", max_shard_bytes=60_000)
            (out / "refusals.json").write_text(json.dumps(refusals(bridge, loaded)))


def refusals(bridge: AutoBridge, model: Any) -> list[str]:
    """The messages about a HybridModel of other layers, and about a GPTModel."""
    found = []
    model.hybrid_layer_pattern = model.hybrid_layer_pattern.replace("E", "-", 1)
    for attempt in (
        lambda: bridge.load_hf_weights(model),
        lambda: bridge.load_hf_weights(megatron.build_model(bridge.hf, model_class="gpt")),
    ):
        try:
            attempt()
        except AmaxbridgeError as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
