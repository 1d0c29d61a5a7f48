"""Files of an input, each looked at once: opened first, and then asked what it is, where it lies and how long it is.

Two looks by path may see two files: between `is_file` and `open`, another program may have put a pipe there, whose
reader would wait for ever, a link that leads out, or another version. The answers of an open file are of that file.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amaxbridge.export.disk.input_paths import refuse_leaving
from amaxbridge.export.disk.io_errors import changed_meanwhile, explaining_reads
from amaxbridge.mappings.errors import CheckpointError

MOST_BYTES = 100_000_000
"""Of a file that is read whole; the safetensors library has the same limit for headers."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_PART = 8 << 20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_input(path: Path, inside: Path | None = None) -> int:
    """Opens a file for reading.

    Args:
        path: the file.
        inside: the directory that it must lie in, through every link; None for a file that the user named.

    Raises:
        CheckpointError: it cannot be opened, is no regular file, or lies elsewhere.
    """
    with explaining_reads(path):
        return _open(path, inside)


def read_input(path: Path, inside: Path | None = None, *, most: int = MOST_BYTES) -> bytes | None:
    """The content of a small file; None if there is none.

    Raises:
        CheckpointError: as `open_input`; or it has more than `most` bytes, or changed while it was read.
    """
    with explaining_reads(path):
        try:
            file = _open(path, inside)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        with _closing(file):
            before = os.fstat(file)
            if before.st_size > most:
                raise CheckpointError(f"{path} has {before.st_size:,} bytes, more than any such file has")
            content = b"".join(_parts(file, before.st_size + 1))
            if len(content) != before.st_size or identity(os.fstat(file)) != identity(before):
                raise changed_meanwhile(path)
            return content


def parts_of(path: Path, inside: Path | None = None) -> Iterator[bytes]:
    """The content of a file of any size, in parts.

    Raises:
        CheckpointError: as `open_input`.
    """
    with explaining_reads(path), _closing(_open(path, inside)) as file:
        yield from _parts(file, None)


def identity(found: os.stat_result) -> tuple[int, ...]:
    """What tells an open file from another one at its path, and from itself after a write."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _open(path: Path, inside: Path | None) -> int:
    if inside is not None:  # before it is opened, because opening a device may do something
        refuse_leaving(path, inside)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a named pipe would never open
    except ValueError as error:  # no file has such a name
        raise CheckpointError(f"{str(path)!a} cannot be read: {error}") from error
    try:
        kind = stat.S_IFMT(os.fstat(file).st_mode)
        if kind != stat.S_IFREG:
            raise CheckpointError(f"{path} cannot be read: it is {_KINDS.get(kind, 'something else')}, not a file")
        if inside is not None and (opened := _place(file)) is not None:  # a link may have changed since
            refuse_leaving(opened, inside, named=path)
    except BaseException:
        os.close(file)
        raise
    return file


def _place(file: int) -> Path | None:
    """Where an open file lies; None if the system does not say, or if it was removed."""
    try:
        place = Path(os.readlink(f"/proc/self/fd/{file}"))
    except OSError:
        return None
    return place if os.path.lexists(place) else None


def _parts(file: int, most: int | None) -> Iterator[bytes]:
    left = most
    while left is None or left > 0:
        part = os.read(file, _PART if left is None else min(_PART, left))
        if not part:
            return
        yield part
        left = None if left is None else left - len(part)


@contextmanager
def _closing(file: int) -> Iterator[int]:
    try:
        yield file
    finally:
        os.close(file)
