"""Real Megatron ranks that save a model as a legacy checkpoint, and export it live.

torchrun --nproc-per-node N live_legacy.py HF_DIR OUT_DIR SIZES_JSON
"""

import json
import sys
from pathlib import Path

from amaxbridge.bridge import AutoBridge, megatron
from tests.workers.legacy_save import save_legacy


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        chunks = megatron.build_chunks(bridge.hf)
        bridge.load_hf_weights(chunks)
        save_legacy(bridge.hf, chunks, out / "legacy_plain")
        bridge.save_hf_pretrained(chunks, out / "live_plain", scheme="none", max_shard_bytes=60_000)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
