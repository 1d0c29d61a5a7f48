"""Moving a finished directory into place, so that at every moment the old output or the new one is there, whole.

Linux can exchange two directories in one system call, which Python does not offer. On a file system that cannot, there
are two moves. A directory that must stay (see `output_place`) gets its files one by one: the old `config.json` leaves
first and the new one comes last, so that no engine takes a mixture for a model.

Everything happens between a staging directory and the target, and a move that is cut short can be called again:

    STAGING/new         the finished output
    STAGING/previous    the old directory, between the two moves
    STAGING/replaced    the old files, where the directory stays; STAGING/.replaced lists them before the first leaves
"""

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path

from amaxbridge.export.disk.io_errors import explaining
from amaxbridge.export.disk.output_place import contents, must_stay
from amaxbridge.mappings.errors import OutputExistsError, WriteError

NEW = "new"
_PREVIOUS, _REPLACED, _LIST = "previous", "replaced", ".replaced"
_FIRST_AND_LAST = "config.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
# The directory cannot be moved, its files can: a mount point, a lower layer of overlayfs, another user's in /tmp
_MUST_STAY = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES)
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def move_into_place(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Moves `STAGING/new` to `target`, or its files into it. What was there is in `staging` afterwards.

    Args:
        overwrite: True to replace what is at the target.

    Raises:
        OutputExistsError: the target is not an empty directory; it and the finished output are left as they are.
    """
    new, previous = staging / NEW, staging / _PREVIOUS
    if (staging / _REPLACED).exists() or must_stay(target):
        _move_files(staging, target, overwrite=overwrite)
        return
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputExistsError(f"output {target} has become something else than a directory meanwhile: move it away")
    if previous.exists() and target.exists():
        raise WriteError(f"{previous} is what was at {target} before: move one of them away")
    try:
        if not overwrite or not target.exists():
            os.rename(new, target)  # fails unless there is nothing, or an empty directory
        elif not _exchange(new, target):
            os.rename(target, previous)
            os.rename(new, target)
    except OSError as error:
        if error.errno in _NOT_EMPTY and contents(target):
            raise OutputExistsError(
                f"output {target} was empty at the start and is not any more: overwrite=True replaces it"
            ) from error
        if error.errno not in _MUST_STAY or not target.is_dir():
            raise
        _move_files(staging, target, overwrite=overwrite)
    else:
        sync_directory(target.parent)
        sync_directory(staging)


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file in one move. A link of this name is replaced, not followed.

    Args:
        content: the whole, or parts of it; if they end in an error, nothing is replaced.

    Raises:
        WriteError: the file system refuses.
    """
    unfinished = path.with_name(f".{path.name}.amaxbridge")
    with explaining(path):
        try:
            unfinished.unlink(missing_ok=True)
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def is_moving(staging: Path) -> bool:
    """True if a move began and was cut short."""
    return any((staging / name).exists() for name in (_PREVIOUS, _REPLACED))


def _move_files(staging: Path, target: Path, *, overwrite: bool) -> None:
    new, replaced, listed = staging / NEW, staging / _REPLACED, staging / _LIST
    anew = not replaced.exists()
    if anew:
        old = contents(target)
        if old and not overwrite:
            raise OutputExistsError(
                f"output {target} was empty at the start and is not any more: overwrite=True replaces it"
            )
        listed.write_text(json.dumps(old))
        sync_file(listed)
        replaced.mkdir()
        sync_directory(staging)
    leaving = [name for name in json.loads(listed.read_text()) if not os.path.lexists(replaced / name)]
    leaving.sort(key=lambda name: name != _FIRST_AND_LAST)
    coming = sorted(os.listdir(new), key=lambda name: (name == _FIRST_AND_LAST, name))
    moves = [(target / name, replaced / name) for name in leaving] + [(new / name, target / name) for name in coming]
    moved: list[tuple[Path, Path]] = []
    try:
        for here, there in moves:
            if os.path.lexists(there):
                raise FileExistsError(errno.EEXIST, "appeared there while the output was moved", str(there))
            if there.name == _FIRST_AND_LAST and there.parent == target:
                sync_directory(target)  # the other files first, also if the machine stops here
            os.rename(here, there)
            moved.append((here, there))
    except OSError:
        for here, there in reversed(moved):
            os.rename(there, here)
        if anew:
            replaced.rmdir()
        raise
    sync_directory(target)
    sync_directory(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two directories; False if the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def sync_tree(directory: Path) -> None:
    """Syncs every file and every name below a directory to the disk, and its own names."""
    for path, _, files in os.walk(directory, topdown=False, onerror=raise_it):
        for name in files:
            sync_file(Path(path, name))
        sync_directory(Path(path))


def raise_it(error: OSError) -> None:
    """For `os.walk`, which passes over directories that cannot be read."""
    raise error


def sync_file(path: Path) -> None:
    """Syncs the content of a file to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_directory(path: Path) -> None:
    """Syncs the names in a directory to the disk, where the file system keeps them apart from the files."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
