"""Replacing a directory by another in one step, so that at every moment one of the two is there, whole.

Linux can exchange two directories in one system call, which Python does not offer. On a file system that cannot, there
are two moves; a run that dies between them leaves the old directory at `OUT.previous`, and `restore_previous` puts it
back.
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
    """Moves `new` to `target`, then removes what was there."""
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
    """Undoes a replacement that was interrupted between its two moves."""
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        os.rename(previous, target)


def _previous(target: Path) -> Path:
    return target.with_name(target.name + ".previous")


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two directories; False if the system cannot."""
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
    """Syncs the names in a directory to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
