"""What `tests/workers/live_checkpoint.py` saves, and its export."""

from pathlib import Path

from amaxbridge.bridge.auto import AutoBridge
from tests.support.launcher import LiveRanks

SCHEMES = {"plain": "none", "nvfp4": "nvfp4", "channels": "fp8_dynamic"}
"""Its forms of a model → the scheme that each is exported in."""


def convert(live: LiveRanks, checkpoint: Path, output: Path, scheme: str) -> None:
    bridge = AutoBridge.from_hf_pretrained(live.hf)
    bridge.convert_checkpoint(checkpoint, output, scheme=scheme, max_shard_bytes=60_000)
