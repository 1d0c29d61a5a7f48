"""Ranks that are threads and ranks that are gloo processes give the same results on the same cases."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amaxbridge.mappings.ranks import LOCAL, Axis, Ranks, run_threads
from tests.support import rank_cases
from tests.support.launcher import Launcher
from tests.support.rank_cases import CASES, EP, TP


def test_threads_do_as_processes_do(launch: Launcher, tmp_path: Path) -> None:
    by_rank = launch.results(rank_cases.on_processes, tmp_path, processes=4)
    for index, case in enumerate(CASES):
        threads = run_threads(4, case, {Axis.TP: TP, Axis.EP: EP})
        assert [results[index] for results in by_rank] == threads, case.__name__


@pytest.mark.parametrize("case", CASES)
def test_one_process_is_a_mesh_of_one(case: Callable[[Ranks], Any]) -> None:
    assert [case(LOCAL)] == run_threads(1, case, {})


def test_a_rank_that_fails_releases_the_others() -> None:
    def one_fails(ranks: Ranks) -> None:
        if ranks.rank(Axis.WORLD) == 1:
            raise KeyError("rank 1 found a problem")
        ranks.all_gather_object(Axis.WORLD, None)

    with pytest.raises(KeyError, match="rank 1 found a problem"):
        run_threads(3, one_fails, {})


def test_tensors_that_differ_in_shape_are_refused() -> None:
    def mismatched(ranks: Ranks) -> None:
        ranks.all_gather(Axis.WORLD, torch.zeros(1 + ranks.rank(Axis.WORLD)))

    with pytest.raises(ValueError, match="differ"):
        run_threads(2, mismatched, {})


def test_slices_of_unexpected_lengths_are_refused() -> None:
    """The message names the lengths, not the bytes."""

    def mismatched(ranks: Ranks) -> None:
        ranks.all_to_all(Axis.WORLD, torch.zeros(100_000, dtype=torch.uint8), [60_000, 40_000], [60_000, 50_000])

    message = r"^rank (0|1) expects \[60000, 50000\] bytes and is sent (\[60000, 60000\]|\[40000, 40000\])$"
    with pytest.raises(ValueError, match=message):
        run_threads(2, mismatched, {})
