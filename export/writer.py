"""Writing a checkpoint so that the target is whole or untouched.

Everything goes to a staging directory beside the target. Shards are created at full size under a temporary name;
ranks, processes or threads then write their tensors at the planned offsets, each through its own `ShardWriter`.
When all have synced, one of them gives the shards their final names and moves the directory into place.

Several processes may write one shard: they must see the same file system.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, uint8

from export.layout import Layout, Shard
from mappings.errors import OutputExistsError
from mappings.tensors import TensorSpec

_TEMPORARY = ".writing"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError when `output` holds anything and may not be replaced."""
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output {output} exists and is not a directory")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputExistsError(f"output {output} exists and is not empty; choose another or give overwrite=true")


class StagedDirectory:
    """A directory that becomes `target` in one move. Used by one process: the others only write into `path`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")

    def create(self, layout: Layout) -> None:
        """Makes the staging directory, and in it every shard at full size with its header. Replaces a left-over one."""
        self.discard()
        self.path.mkdir(parents=True)
        for shard in layout.shards:
            with open(self.path / (shard.file_name + _TEMPORARY), "xb") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)

    def commit(self, layout: Layout) -> None:
        """Gives the shards their names, syncs, and moves the directory to the target, replacing what was there."""
        for shard in layout.shards:
            os.rename(self.path / (shard.file_name + _TEMPORARY), self.path / shard.file_name)
        _sync_directory(self.path)
        previous = self.target.with_name(self.target.name + ".previous")
        if self.target.exists():
            os.rename(self.target, previous)
        os.rename(self.path, self.target)
        _sync_directory(self.target.parent)
        shutil.rmtree(previous, ignore_errors=True)

    def discard(self) -> None:
        """Removes the staging directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_file(self, name: str, content: bytes) -> None:
        """Writes one small file, synced."""
        with open(self.path / name, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())


class ShardWriter:
    """Writes tensors at their planned places. Each process (or thread) that writes has its own."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory = directory
        self._shard_of: Mapping[str, Shard] = {name: shard for shard in layout.shards for name in shard.specs}
        self._files: dict[str, int] = {}

    def write(self, name: str, tensor: Tensor, part: int | None = None) -> None:
        """Writes one tensor.

        Args:
            part: the index along the first dim of the planned tensor, where this one is only that part of it.

        Raises:
            ValueError: the tensor is not the planned one; a fault of the program, not of the user.
        """
        shard = self._shard_of[name]
        planned, at = shard.specs[name], shard.offsets[name]
        if part is not None:
            planned = TensorSpec(planned.shape[1:], planned.dtype)
            at += part * planned.nbytes
        if TensorSpec.of(tensor) != planned:
            raise ValueError(f"{name}: planned {planned}, given {TensorSpec.of(tensor)}")
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy())
        file = self._open(shard.file_name)
        while data:
            written = os.pwrite(file, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        """Syncs what was written to the disk and closes the files."""
        while self._files:
            _, file = self._files.popitem()
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def _open(self, file_name: str) -> int:
        if file_name not in self._files:
            self._files[file_name] = os.open(self._directory / (file_name + _TEMPORARY), os.O_WRONLY)
        return self._files[file_name]


def _sync_directory(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
