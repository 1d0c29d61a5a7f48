"""Errors of the file system, said so that a user can act: the file, what is wrong with it, the next step."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from amaxbridge.mappings.errors import CheckpointError, WriteError

_AGAIN = "run the same command again"
_ROOM = f"free space and {_AGAIN}"
_RIGHTS = f"make it writable for this user and {_AGAIN}, or choose another output"
_FAILED = f"the disk or its server failed: look into the system's log, then {_AGAIN}"
_FILES = f"raise the limit of open files (ulimit -n) and {_AGAIN}"
_NEXT_STEP = MappingProxyType(
    {
        errno.ENOSPC: _ROOM,
        errno.EDQUOT: _ROOM,
        errno.EACCES: _RIGHTS,
        errno.EPERM: _RIGHTS,
        errno.EROFS: _RIGHTS,
        errno.EIO: _FAILED,
        errno.ESTALE: _FAILED,
        errno.ETIMEDOUT: _FAILED,
        errno.EMFILE: _FILES,
        errno.ENFILE: _FILES,
        errno.EFBIG: "raise the limit of file sizes (ulimit -f), or write smaller files",
        errno.ELOOP: f"it is a link, which is not followed here: move it away and {_AGAIN}",
        errno.ENOENT: f"another program removed it: {_AGAIN}",
    }
)


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turns an OSError of writing `path` into a WriteError that names the file and the next step."""
    try:
        yield
    except OSError as error:
        raise WriteError(_said(error, path)) from error


@contextlib.contextmanager
def explaining_reads(path: Path) -> Iterator[None]:
    """Turns an OSError of reading `path` into a CheckpointError that names the file and the next step."""
    try:
        yield
    except OSError as error:
        why, next_step = error.strerror or str(error), _NEXT_STEP.get(error.errno or 0, _AGAIN)
        next_step = "make it readable for this user" if next_step is _RIGHTS else next_step
        raise CheckpointError(f"{_named(error, path)} cannot be read: {why}; {next_step}") from error


def changed_meanwhile(*paths: Path) -> CheckpointError:
    """The error for files, any of which changed while they were read."""
    return CheckpointError(f"{' or '.join(map(str, paths))} changed while it was read: {_AGAIN}")


def _said(error: OSError, path: Path) -> str:
    why = error.strerror or str(error)
    return f"{_named(error, path)}: {why}; {_NEXT_STEP.get(error.errno or 0, _AGAIN)}"


def _named(error: OSError, path: Path) -> str:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(path)
