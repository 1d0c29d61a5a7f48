"""Megatron's distributed checkpoints (`torch_dist`) on the disk."""

from pathlib import Path

from mappings.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"


def checkpoint_iteration(path: Path) -> Path:
    """The iteration directory of a Megatron checkpoint: `path` itself, or the latest one inside it.

    Raises:
        CheckpointError: there is no distributed checkpoint.
    """
    latest = path / LATEST
    directory = path / f"iter_{int(latest.read_text()):07d}" if latest.is_file() else path
    if not (directory / ".metadata").is_file():
        raise CheckpointError(f"{directory} is not a Megatron distributed checkpoint (torch_dist): no .metadata there")
    return directory
