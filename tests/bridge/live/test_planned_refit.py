"""A refit that is planned once yields, after every step, what a checkpoint saved then holds, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launcher import Launcher
from tests.support.paths import WORKERS
from tests.workers.live_planned_refit import CHANGES, SCHEMES, STEPS

RUNS = {"dense at TP=2": {"tp": 2}, "experts at EP=2": {"tp": 1, "ep": 2}, "dense at PP=2": {"tp": 1, "pp": 2}}


@pytest.fixture(scope="module")
def reports(
    launch: Launcher, qwen3: Path, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """What each rank of each run found."""
    root, found = tmp_path_factory.mktemp("planned_refit"), {}
    for number, (run, sizes) in enumerate(RUNS.items()):
        hf = qwen3_moe if "experts" in run else qwen3
        launch(WORKERS / "live_planned_refit.py", hf, root / str(number), json.dumps(sizes), processes=2)
        found[run] = [json.loads((root / str(number) / f"{rank}.json").read_text()) for rank in range(2)]
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("run", RUNS)
def test_every_step_is_the_checkpoint_of_that_step(reports: dict[str, list[Any]], run: str, scheme: str) -> None:
    steps = list(zip(*(report[scheme] for report in reports[run]), strict=True))
    assert len(steps) == STEPS
    for ranks in steps:
        assert all(rank["plans"] == 1 for rank in ranks), "planned once"
        assert not ranks[0]["run"].keys() & ranks[1]["run"].keys(), "each tensor comes from one rank"
        assert ranks[0]["run"] | ranks[1]["run"] == ranks[0]["saved"]
    assert steps[0][0]["run"] != steps[1][0]["run"], "training changes the tensors"


UNCHANGED = ("nothing", "back and forth")
TAKEN = ("other storage", "replaced amax")
PLANNED_ANEW = ("other parameter", "other module")
REFUSED = {
    "other rows": "now [64, 12] float8_e4m3fn",
    "disabled": "mlp.gate_proj",
    "block sizes in place": "block_sizes",
    "rotated": "_rotate",
    "zero amax": "mlp.gate_proj.input_quantizer._amax: 0.0",
    "no amax": "mlp.gate_proj.input_quantizer._amax: missing",
    "NaN amax on one rank": "mlp.gate_proj.input_quantizer._amax: inf",
}


def test_every_change_is_expected_to_have_an_outcome() -> None:
    assert {*UNCHANGED, *TAKEN, *PLANNED_ANEW, *REFUSED} == CHANGES.keys()


@pytest.mark.parametrize("change", [*UNCHANGED, *TAKEN, *PLANNED_ANEW])
def test_a_change_is_taken(reports: dict[str, list[Any]], change: str) -> None:
    for rank in reports["dense at TP=2"]:
        outcome = rank["changes"][change]
        assert outcome["right"]
        assert outcome["plans"] == (2 if change in PLANNED_ANEW else 1)
    assert any(rank["changes"][change]["differs"] for rank in reports["dense at TP=2"]) == (change not in UNCHANGED)


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_is_refused_on_every_rank(reports: dict[str, list[Any]], change: str) -> None:
    messages = {rank["changes"][change]["refused"] for rank in reports["dense at TP=2"]}
    assert len(messages) == 1
    assert REFUSED[change] in messages.pop()
