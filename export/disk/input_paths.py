"""Paths that an input names: where one may point, decided in this one place.

An index, the metadata of a checkpoint and the links in a directory come from the maker of the input. A name from there
must stay inside the input's directory, and inside the output once it is used there: `../victim.safetensors` or an
absolute path would overwrite files of the user, and a link to `~/.ssh/id_ed25519` would publish one.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from amaxbridge.mappings.errors import CheckpointError, UsageError, listing

_LONGEST = 255  # bytes of a part of a path, on every file system of Linux
_MOST = 16  # parts
_SHOWN = 200


def checked_name(name: object, named_by: Path | str) -> str:
    """Returns a file name that an input gives, if it is relative and leads downwards.

    Sub-directories are allowed, as on the Hub. Hidden names are not: the staging directory keeps its own there. No part
    may be longer than Linux allows.

    Args:
        name: the name as it was read.
        named_by: the file that names it, for the message.

    Raises:
        CheckpointError: the name is absolute, leads upwards, is hidden, too long, or is not a printable string.
    """
    if isinstance(name, str) and name.isprintable() and "\\" not in name:
        parts = name.split("/")
        lengths = [len(part.encode()) for part in parts]
        if all(part and not part.startswith(".") for part in parts) and max(lengths) <= _LONGEST and len(parts) < _MOST:
            return name
    raise CheckpointError(
        f"{named_by} names the file {_shown(name)}: a name must be relative, short, without '..' and hidden parts. Do "
        "not use this checkpoint unless you trust its source; download it again from there"
    )


def refuse_alike(names: Iterable[str], named_by: Path | str) -> None:
    """Refuses names that some file systems take for one: they differ in case, or in how accents are composed.

    Raises:
        CheckpointError: there are such names; all are listed.
    """
    spelled: dict[str, set[str]] = {}
    for name in names:
        spelled.setdefault(normalize("NFC", normalize("NFC", name).casefold()), set()).add(name)
    alike = [", ".join(sorted(each)) for each in spelled.values() if len(each) > 1]
    if alike:
        raise CheckpointError(
            f"{named_by} names files that are one file where case does not count:{listing(alike)}\nRename them"
        )


def _readable(path: str | Path) -> str:
    text = str(path)
    return text if text.isprintable() and len(text) <= _SHOWN else _shown(text)


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"


def weight_file_name(name: object, named_by: Path | str) -> str:
    """As `checked_name`, for a file of weights, which ends in `.safetensors`."""
    checked = checked_name(name, named_by)
    if PurePosixPath(checked).suffix != ".safetensors":
        raise CheckpointError(f"{named_by} names the file {checked!r} for weights: it must end in .safetensors")
    return checked


def leaves(path: Path, directory: Path) -> bool:
    """True if a path inside `directory` leads outside of it by a symbolic link.

    The files of a snapshot in the Hub's cache are links to `blobs/` of the same cache entry; these count as inside.
    """
    root = resolved(directory)
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    return not any(resolved(path).is_relative_to(each) for each in roots)


def resolved(path: Path) -> Path:
    """Where a path leads, through every link.

    Raises:
        CheckpointError: its links lead in a circle, or it is no path.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # which of them depends on Python's version
        raise CheckpointError(f"{path} is a link that leads in a circle: put the file there") from error
    except ValueError as error:
        raise CheckpointError(f"{_readable(path)} cannot be read: {error}") from error


def given_path(path: str | Path) -> Path:
    """A path that a user gives, with `~` expanded. It need not lead anywhere.

    Raises:
        UsageError: it cannot be followed: its links lead in a circle, a name is too long or is none, a directory may
            not be looked into, there is no such user's home.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"{path!r} is no path: give the name of a directory, not {type(path).__name__}")
    try:
        given = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            given.stat()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{_readable(path)} leads nowhere ({why}): give another path") from error
    return given


def refuse_leaving(path: Path, directory: Path, *, named: Path | None = None) -> None:
    """Raises CheckpointError if a path inside `directory` leads outside of it by a symbolic link.

    Args:
        named: the path as the user knows it; None for `path`.
    """
    if leaves(path, directory):
        raise CheckpointError(
            f"{named or path} is a link to {resolved(path)}, outside of {directory}: copy the file there, or give the "
            "directory that the link points to"
        )
