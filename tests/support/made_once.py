"""Directories that the worker processes of one test run share: the first that needs one makes it."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a test run, one for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(directory: Path, make: Callable[[Path], object]) -> Path:
    """The directory, once `make` has made it. Other processes wait meanwhile; if it fails, they make it anew."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(f"{directory}.made")
    with Path(f"{directory}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(directory, ignore_errors=True)
            make(directory)
            made.touch()
    return directory
