"""Which build this is, so that what a checkpoint was made by can be told afterwards.

A wheel and an sdist carry a version that the version control gave when they were built. An editable installation was
built once and changes with every commit: there the commit is asked for, and whether files differ from it. An archive
that `git archive` made has no version control; it wrote the commit into `archived_commit.txt`.
"""

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
_ARCHIVED = Path(__file__).with_name("archived_commit.txt")
_UNKNOWN = "0"  # neither installed nor in a checkout
_OF_ANOTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # git sets them in its hooks


@cache
def build_version() -> str:
    """As in PEP 440: `0.3.0`, or `0.3.1.dev4+g1a2b3c4d5` with the commit, and `.dirty` where files differ from it."""
    try:
        built = version("amaxbridge")
    except PackageNotFoundError:
        built = _UNKNOWN
    commit = _commit() if (_CHECKOUT / ".git").exists() else _archived() if "dev" in built else ""
    return f"{built.partition('+')[0]}+g{commit}" if commit else built


def _archived() -> str:
    """Empty in a wheel that was not made of an archive."""
    text = _ARCHIVED.read_text().strip()
    return "" if text.startswith("$") else text


def _commit() -> str:
    """Of the checkout that this file lies in; empty where git is not installed or may not read it."""
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--exclude=*", "--abbrev=9", "--dirty=.dirty"]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
