"""Checkpoints of real ranks, in every format that they save."""

from pathlib import Path

import pytest

from tests.support.launcher import Launcher, LiveRanks


@pytest.fixture(scope="module")
def dense(launch: Launcher, qwen3: Path, shared: Path) -> LiveRanks:
    return LiveRanks(launch, "live_checkpoint.py", qwen3, shared / "checkpoints")


@pytest.fixture(scope="module")
def moe(launch: Launcher, qwen3_moe: Path, shared: Path) -> LiveRanks:
    return LiveRanks(launch, "live_checkpoint.py", qwen3_moe, shared / "moe_checkpoints")
