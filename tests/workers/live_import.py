"""Real Megatron ranks that load what import_hf made, at one topology after the other, and compute.

    torchrun --nproc-per-node N live_import.py STEPS_JSON

A step is `{"sizes": …, "hf": …, "load": CKPT, "out": PATH}`: logits go to `PATH.pt`; where there are pipeline stages,
the live model is exported to PATH instead. Or `{"sizes": …, "hf": …, "import": CKPT}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.import_hf import import_hf
from amaxbridge.bridge.live.process_ranks import process_group, world_rank
from tests.support.without_fla import without_fla
from tests.workers.model import forward


def main(steps: list[dict[str, Any]]) -> None:
    with process_group():
        for step in steps:
            with megatron.distributed(**step["sizes"]), without_fla():
                take(step, AutoBridge.from_hf_pretrained(step["hf"]))


def take(step: dict[str, Any], bridge: AutoBridge) -> None:
    if "import" in step:
        report = import_hf(bridge.hf, Path(step["import"]))
        assert not report.left, report.left
        assert not report.changed, report.changed
        return
    chunks = megatron.build_chunks(bridge.hf)
    megatron.load_checkpoint(chunks, Path(step["load"]))
    if step["sizes"].get("pp", 1) > 1:
        bridge.save_hf_pretrained(chunks, step["out"], max_shard_bytes=30_000)
        return
    logits = forward(chunks[0])
    if world_rank() == 0:
        torch.save(logits, step["out"] + ".pt")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
