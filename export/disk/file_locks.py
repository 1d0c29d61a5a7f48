"""Locks between processes on one machine, or on several that share a file system. The kernel releases those of dead
processes.

Locks are on files, not directories: NFS sends file locks to its server, but keeps locks on a directory to one machine.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from amaxbridge.mappings.errors import WriteError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Mutex:
    """A mutual exclusion between processes: a locked file in a directory that may come and go.

    Args:
        path: path of the file. Its directory is made where it is not there; who removes the directory holds the mutex
            and removes the file last.
        required: True to refuse a file system without locks; False to go on without waiting there.
    """

    def __init__(self, path: Path, *, required: bool) -> None:
        self._path, self._required = path, required
        self._file = -1

    def acquire(self) -> None:
        """Waits until no other process holds the mutex. Does nothing if this process already does.

        Raises:
            WriteError: the file system has no locks, and they are required.
        """
        while self._file < 0:
            self._path.parent.mkdir(exist_ok=True)
            try:
                file = hold(self._path, wait=True, required=self._required)
            except FileNotFoundError:  # its last holder removed the directory just now
                continue
            if is_at(file, self._path):
                self._file = file
            else:  # its last holder removed the file; a third process may hold a new one by now
                os.close(file)

    @property
    def held(self) -> bool:
        """True if this process holds it."""
        return self._file >= 0

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def hold(path: Path, *, wait: bool = False, required: bool = True) -> int:
    """Opens or creates a file and locks it. A link is not followed: it may lead to a file of somebody's.

    Returns:
        The open file, whose closing releases the lock; -1 if another process holds it and `wait` is False.

    Raises:
        WriteError: the file system has no locks, and they are required.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # NFS locks only files that are open for writing
    file = os.open(path, flags, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        no_locks = error.errno in _NO_LOCKS
        if error.errno == errno.ESTALE or (no_locks and not required):  # ESTALE: another machine removed the file
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
    """True if another process holds the file."""
    file = hold(path, required=False)
    if file >= 0:
        os.close(file)
    return file < 0


def is_at(file: int, path: Path) -> bool:
    """True if the open file is the one at this path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file), path.lstat())
    return False
