"""Where ModelOpt loses amax while it loads a checkpoint, they are restored, or the quantizers are named."""

import json
from pathlib import Path

import pytest

from tests.support.launcher import Launcher, LiveRanks


@pytest.fixture(scope="module")
def outcomes(launch: Launcher, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    live = LiveRanks(launch, "live_reload.py", qwen3_moe, tmp_path_factory.mktemp("reload"))
    found: dict[str, str] = json.loads((live.at() / "outcomes.json").read_text())
    assert int(found.pop("amax")) > 30
    return found


@pytest.mark.parametrize("lost", ["as it is", "experts"])
def test_every_quantizer_gets_its_amax(outcomes: dict[str, str], lost: str) -> None:
    assert outcomes[lost] == "the same"


def test_what_has_no_place_is_named(outcomes: dict[str, str]) -> None:
    assert "no place for" in outcomes["all"]
    assert "decoder.layers.0.self_attention.linear_qkv.weight_quantizer._amax" in outcomes["all"]
    assert "no place for 1 values" in outcomes["quantizers"]
    assert "linear_qkv.weight_quantizer._amax" in outcomes["quantizers"]
    assert "no place for" in outcomes["no quantizers"]
