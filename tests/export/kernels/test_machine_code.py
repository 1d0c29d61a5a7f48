"""Compiled loops: numba makes them once, later processes load them without it, and bad files are made again."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ENVIRONMENT

PROGRAM = """
import sys, torch
from amaxbridge.export.kernels import e2m1
print(e2m1.largest_magnitude(torch.arange(-9.0, 5.0).bfloat16()).item(), "numba" in sys.modules)
"""
MADE, LOADED = ["9.0", "True"], ["9.0", "False"]


def in_a_process(cache: Path, before: str = "") -> list[str]:
    """Runs the loops in a process: their result, True if numba was imported, and the log. `before` runs first."""
    caches = {"XDG_CACHE_HOME": str(cache), "NUMBA_CACHE_DIR": str(cache / "numba")}
    ran = subprocess.run(
        [sys.executable, "-c", before + PROGRAM],
        env={**ENVIRONMENT, **caches},
        check=True,
        capture_output=True,
        text=True,
    )
    return [*ran.stdout.split(), *ran.stderr.splitlines()]


def test_made_once_and_loaded_by_others(tmp_path: Path) -> None:
    assert in_a_process(tmp_path) == MADE
    assert in_a_process(tmp_path) == LOADED


def test_a_file_that_is_cut_short_is_made_again(tmp_path: Path) -> None:
    in_a_process(tmp_path)
    [kept] = (tmp_path / "amaxbridge").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    assert in_a_process(tmp_path) == MADE
    assert [path.read_bytes() for path in kept.parent.iterdir()] == [whole]


def test_where_nothing_can_be_kept_each_process_makes_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert in_a_process(tmp_path / "file") == MADE


UNKNOWN = {
    "an argument more": "from amaxbridge.export.kernels import compiled; compiled._RESULTS = ('ptr', 'ptr', 'ptr')",
    "a call into Python": "from amaxbridge.export.kernels import machine_code as each; each._FROM_OUTSIDE = ('none',)",
    "a name that moved": "from numba.core.dispatcher import _DispatcherBase as each; del each.inspect_llvm",
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_code_that_is_not_as_known_is_left_to_numba(change: str, tmp_path: Path) -> None:
    """The result is the same, one line says so, and numba keeps the code itself."""
    found, imported, *said = in_a_process(tmp_path, change)
    assert [found, imported] == MADE
    assert len(said) == 1
    assert said[0].startswith("numba ")
    assert len(list((tmp_path / "numba").rglob("*.nbc"))) == 1
