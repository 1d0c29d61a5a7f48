"""Opens a checkpoint of training, in whichever format it was saved."""

from pathlib import Path

from amaxbridge.bridge.stored.checkpoint_kinds import METADATA, rank_files
from amaxbridge.bridge.stored.fsdp_dtensor import FsdpCheckpoint
from amaxbridge.bridge.stored.legacy_torch import LegacyCheckpoint
from amaxbridge.bridge.stored.saved_iteration import checkpoint_iteration
from amaxbridge.bridge.stored.stored_source import StoredSource
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.export.disk.io_errors import explaining_reads
from amaxbridge.export.disk.source_files import SourceFiles


def open_checkpoint(path: Path) -> StoredSource:
    """The checkpoint of Megatron's training at a path, open for reading.

    Args:
        path: the training's save directory, or one `iter_NNNNNNN` in it.

    Raises:
        CheckpointError: there is no checkpoint in a known format, or files are missing or too short; all are named.
    """
    directory = checkpoint_iteration(path)
    if not (directory / METADATA).is_file():
        return LegacyCheckpoint.open(directory)
    opened = DistCheckpoint(directory)
    return FsdpCheckpoint(opened) if FsdpCheckpoint.fits(opened) else opened


def files_of(path: Path, *, hashed: bool = False) -> SourceFiles:
    """The files of a checkpoint, as they are now; take them before it is opened.

    Args:
        path: as for `open_checkpoint`.
        hashed: as in `SourceFiles`.
    """
    directory = checkpoint_iteration(path)
    with explaining_reads(directory):
        names = rank_files(directory)
        if (directory / METADATA).is_file():
            names = [file.name for file in directory.iterdir() if file.is_file()]
    return SourceFiles.of(directory, names, hashed=hashed)
