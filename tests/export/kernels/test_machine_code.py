"""Compiled loops: made by numba once, loaded without it by later processes, made again where what is kept is bad."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, torch
from amaxbridge.export.kernels import e2m1
print(e2m1.largest_magnitude(torch.arange(-9.0, 5.0).bfloat16()).item(), "numba" in sys.modules)
"""
MADE, LOADED = ["9.0", "True"], ["9.0", "False"]


def in_a_process(cache: Path) -> list[str]:
    """What it found, and whether it needed numba."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()


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
