"""Locks between processes, on one machine or several that share a file system. The kernel frees those of the dead.

They are on files, not directories: NFS sends locks of files to its server, those of a directory stay on one machine.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from amaxbridge.mappings.errors import WriteError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Mutex:
    """What one process at a time holds: a file that is there while it is held.

    Args:
        path: of the file.
        required: whether to refuse a file system without locks; else nobody is kept waiting on it.
    """

    def __init__(self, path: Path, *, required: bool) -> None:
        self._path, self._required = path, required
        self._file = -1

    def acquire(self) -> None:
        """Waits until no other process holds it; nothing where this one does.

        Raises:
            WriteError: the file system has no locks.
        """
        while self._file < 0:
            file = hold(self._path, wait=True, required=self._required)
            if is_at(file, self._path):
                self._file = file
            else:  # the one before removed it, and a third may hold another by now
                os.close(file)

    def release(self) -> None:
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def hold(path: Path, *, wait: bool = False, required: bool = True) -> int:
    """Makes a file, unless there is one, and locks it.

    Returns:
        The open file, which closing frees; -1 where another process holds it and this one is not to wait.

    Raises:
        WriteError: the file system has no locks, and they are required.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks what is open for writing
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        no_locks = error.errno in _NO_LOCKS
        if error.errno == errno.ESTALE or (no_locks and not required):  # stale: another machine has removed it
            return file
        os.close(file)
        if isinstance(error, BlockingIOError):
            return -1
        if not no_locks:
            raise
        path.unlink(missing_ok=True)
        raise WriteError(
            f"{path}: {error.strerror}. Several processes need a file system whose locks hold on all their "
            "machines (NFS 4, or Lustre mounted with -o flock); one process does without"
        ) from error
    return file


def is_held(path: Path) -> bool:
    """Whether another process holds a file."""
    file = hold(path, required=False)
    if file >= 0:
        os.close(file)
    return file < 0


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one that lies at a path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False
