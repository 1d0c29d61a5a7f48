"""Putting a directory in the place of another in one step, so that at any moment one of them is there, whole.

Linux exchanges two directories in one system call, which Python does not offer. Where the file system cannot, there are
two moves, and a run that dies between them leaves the old directory as `OUT.previous`: `restore_previous` puts it back.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def replace_directory(new: Path, target: Path) -> None:
    """Moves `new` to `target`; what was there is removed after it."""
    if not target.exists():
        os.rename(new, target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
    else:
        previous = _previous(target)
        os.rename(target, previous)
        os.rename(new, target)
        shutil.rmtree(previous, ignore_errors=True)
    sync_directory(target.parent)


def restore_previous(target: Path) -> None:
    """Undoes a replacement that ended between its two moves."""
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        os.rename(previous, target)


def _previous(target: Path) -> Path:
    return target.with_name(target.name + ".previous")


def _exchange(one: Path, other: Path) -> bool:
    """Whether the two now stand in each other's place."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


def sync_directory(path: Path) -> None:
    """Makes the names in a directory last."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
