"""Paths that an input names: where one may point, decided in this one place.

An index, the metadata of a checkpoint and the links in a directory come from the maker of the input. A name from there
must stay inside the input's directory, and inside the output once it is used there: `../victim.safetensors` or an
absolute path would overwrite files of the user, and a link to `~/.ssh/id_ed25519` would publish one.
"""

from pathlib import Path, PurePosixPath

from amaxbridge.mappings.errors import CheckpointError


def checked_name(name: object, named_by: Path | str) -> str:
    """Returns a file name that an input gives, if it is relative and leads downwards.

    Sub-directories are allowed, as on the Hub. Hidden names are not: the staging directory keeps its own there.

    Args:
        name: the name as it was read.
        named_by: the file that names it, for the message.

    Raises:
        CheckpointError: the name is absolute, leads upwards, is hidden, or is not a printable string.
    """
    if isinstance(name, str) and name.isprintable() and "\\" not in name:
        parts = name.split("/")
        if all(part and not part.startswith(".") for part in parts):
            return name
    raise CheckpointError(
        f"{named_by} names the file {name!r}: a name must be relative, without '..' and hidden parts. Do not use this "
        "checkpoint unless you trust its source; download it again from there"
    )


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
    root = directory.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    return not any(path.resolve().is_relative_to(each) for each in roots)


def refuse_leaving(path: Path, directory: Path) -> None:
    """Raises CheckpointError if a path inside `directory` leads outside of it by a symbolic link."""
    if leaves(path, directory):
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, outside of {directory}: copy the file there, or give the directory "
            "that the link points to"
        )
