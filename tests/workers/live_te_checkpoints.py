"""Checkpoints of Transformer Engine models, loaded into models of Megatron's own layers and exported from there.

    torchrun --nproc-per-node 1 live_te_checkpoints.py CASES_DIR OUT_DIR SIZES_JSON

CASES_DIR has cases of `tests/fixtures/te`, unpacked. What each gives is in `OUT_DIR/CASE`.
"""

import json
import sys
from pathlib import Path

from amaxbridge.bridge import AutoBridge, megatron


def main(cases: Path, out: Path, sizes: dict[str, int]) -> None:
    for directory in sorted(cases.iterdir()):
        scheme = json.loads((directory / "expected.json").read_text())["scheme"]
        bridge = AutoBridge.from_hf_pretrained(directory)
        with megatron.distributed(**sizes):
            model = megatron.build_model(bridge.hf, model_class="hybrid" if "hybrid" in directory.name else None)
            megatron.load_checkpoint(model, directory / "checkpoint")
            bridge.save_hf_pretrained(model, out / directory.name, scheme=scheme)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
