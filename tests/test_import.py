"""A served checkpoint goes back into Megatron, for any topology, and comes out again as it was."""

import json
from pathlib import Path

import pytest
import torch
from conftest import WORKERS, Launcher, LiveRanks
from test_megatron_moe import same_files

from bridge.auto import AutoBridge


def import_and_load(launch: Launcher, source: Path, out: Path, sizes: dict[str, int], other: dict[str, int]) -> None:
    """Imports at one topology, by as many processes as it needs; loads at it and at another."""
    processes = sizes["tp"] * sizes.get("pp", 1) * sizes.get("ep", 1)
    steps = [
        {"hf": str(source), "sizes": sizes, "import": str(out / "checkpoint")},
        {"hf": str(source), "sizes": sizes, "load": str(out / "checkpoint"), "logits": str(out / "same.pt")},
        {"hf": str(source), "sizes": other, "load": str(out / "checkpoint"), "logits": str(out / "other.pt")},
    ]
    launch(WORKERS / "live_import.py", json.dumps(steps), processes=processes)


def test_dense(launch: Launcher, live: LiveRanks, tmp_path: Path) -> None:
    source = live.at(tp=2) / "nvfp4"
    import_and_load(launch, source, tmp_path, {"tp": 2}, {"tp": 1})
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.convert_checkpoint(tmp_path / "checkpoint", tmp_path / "out", scheme="nvfp4", max_shard_bytes=30_000)
    same_files(tmp_path / "out", source)
    same, other = torch.load(tmp_path / "same.pt"), torch.load(tmp_path / "other.pt")
    assert (same - other).norm() < 1e-5 * same.norm()
