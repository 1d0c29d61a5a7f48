"""The directory of one saved iteration, in a training's save directory."""

from pathlib import Path

from amaxbridge.bridge.stored.checkpoint_kinds import LATEST, METADATA, rank_files, why_not
from amaxbridge.export.disk.input_files import read_input
from amaxbridge.export.disk.input_paths import checked_name
from amaxbridge.export.disk.io_errors import explaining_reads
from amaxbridge.mappings.errors import CheckpointError

RELEASE = "release"
"""Megatron's name, in place of an iteration, for the initial weights of a training."""
_MOST_OF_LATEST = 4096  # bytes of the file that names an iteration


def checkpoint_iteration(path: Path) -> Path:
    """The iteration directory of a Megatron checkpoint: `path` itself, or the latest one inside it.

    Raises:
        CheckpointError: `path` has no checkpoint in a known format.
    """
    with explaining_reads(path):
        latest = path / LATEST
        said = read_input(latest, path, most=_MOST_OF_LATEST)
        iteration = (said or b"").decode(errors="replace").strip()
        name = f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
        directory = path / checked_name(name, latest) if name else path
        if not (directory / METADATA).is_file() and not rank_files(directory):
            looked_at = directory if directory.exists() else path
            raise CheckpointError(f"{directory} is not a checkpoint of Megatron's training: {why_not(looked_at)}")
        return directory
