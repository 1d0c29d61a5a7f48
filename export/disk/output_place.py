"""Where an output is written: the directory that the user's path leads to, and the staging directory for it.

The path is resolved once, at the start: through links, to a directory that may not exist yet. Normally the staging
directory is `OUT.partial`, beside it, and one move puts it into place. Some directories must stay what they are: a
mount point (`docker run -v`), a directory whose parent is not ours to write in, the current directory. For these the
staging directory lies inside, as `OUT/.amaxbridge.partial`, and files are moved out of it one by one.

A staging directory carries a mark: a file that is made first in it and removed last. What has the name of a staging
directory and no mark is somebody's, and is never touched.
"""

import os
import re
from pathlib import Path

from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.mappings.errors import OutputExistsError

MARK = ".amaxbridge.lock"
"""The file that marks a staging directory as ours; processes that open, complete or remove it hold its lock."""

INSIDE = ".amaxbridge.partial"
_OF_THE_FILE_SYSTEM = ("lost+found",)


def resolved_output(path: str | Path) -> Path:
    """The directory that a user's path leads to, through every link; it need not exist.

    Raises:
        UsageError: as `given_path`.
    """
    return given_path(path).resolve()


def must_stay(target: Path) -> bool:
    """True if the directory `target` cannot, or must not, be replaced by another of its name."""
    if not target.is_dir():
        return False
    return _is_mounted(target) or not os.access(target.parent, os.W_OK | os.X_OK) or _is_current(target)


def staging_directory(target: Path) -> Path:
    """The directory in which the output for `target` grows."""
    inside = target / INSIDE
    if must_stay(target) or (inside / MARK).is_file():  # the latter from a run that saw it so
        return inside
    return target.with_name(target.name + ".partial")


def contents(target: Path) -> list[str]:
    """What is in the directory `target`, without what is ours or the file system's own."""
    if not target.is_dir():
        return []
    return sorted(name for name in os.listdir(target) if name not in (INSIDE, *_OF_THE_FILE_SYSTEM))


def check_ours(staging: Path) -> None:
    """Raises OutputExistsError if something of another's has the name of the staging directory."""
    if not os.path.lexists(staging):
        return
    if staging.is_symlink() or not staging.is_dir():
        raise OutputExistsError(_not_ours(staging, "is not a directory"))
    names = os.listdir(staging)
    if names and MARK not in names and not (staging / MARK).exists():
        raise OutputExistsError(_not_ours(staging, f"was not made by amaxbridge: it has no {MARK}"))


def _not_ours(staging: Path, why: str) -> str:
    return (
        f"{staging} has the name that the unfinished output needs, and {why}. It is left as it is: move it away, or "
        "choose another output"
    )


def _is_mounted(path: Path) -> bool:
    """True for a mount point, also of a directory of the same file system, which `os.path.ismount` does not know."""
    return os.path.ismount(path) or str(path) in _mount_points()


def _mount_points() -> set[str]:
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not on Linux
        return set()
    return {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines}


def _is_current(path: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(path)
    except OSError:  # it was removed
        return False
