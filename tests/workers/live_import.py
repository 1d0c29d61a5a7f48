"""Real Megatron ranks that import a Hugging Face directory, load checkpoints, and compute.

    torchrun --nproc-per-node N live_import.py STEPS_JSON

A step is `{"sizes": …, "hf": …}` and either `"import": CKPT` or `"load": CKPT, "logits": FILE, "export": OUT`.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)

import torch  # noqa: E402
from model import forward  # noqa: E402

from bridge import AutoBridge, megatron  # noqa: E402
from bridge.import_hf import import_hf  # noqa: E402
from bridge.ranks import process_group, world_rank  # noqa: E402


def main(steps: list[dict[str, Any]]) -> None:
    with process_group():
        for step in steps:
            with megatron.distributed(**step["sizes"]):
                take(step, AutoBridge.from_hf_pretrained(step["hf"]))


def take(step: dict[str, Any], bridge: AutoBridge) -> None:
    if "import" in step:
        report = import_hf(bridge.hf, Path(step["import"]))
        assert not report.changed, report.changed
        return
    chunks = megatron.build_chunks(bridge.hf)
    megatron.load_checkpoint(chunks, Path(step["load"]))
    if "export" in step:
        bridge.save_hf_pretrained(chunks, step["export"], max_shard_bytes=60_000)
    logits = forward(chunks[0])
    if world_rank() == 0:
        torch.save(logits, step["logits"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
