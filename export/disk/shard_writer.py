"""Writing rows at their places in the shards of a staging directory, and journalling what is safely on the disk.

A thread of its own syncs, so that the disk works while weights are quantized. Several processes on one file system may
write the same shard.
"""

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from torch import Tensor, uint8

from amaxbridge.export.disk.io_errors import explaining
from amaxbridge.export.disk.open_files import Descriptor, OpenFiles
from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.tensors import TensorSpec

_SYNC_BYTES = 64 << 20


class Owner(Protocol):
    """The run that writes, as its shards know it: `StagedDirectory`."""

    def check_mine(self) -> None:
        """Raises WriteError if another run has taken the directory over."""

    def note_done(self, bundles: Sequence[str]) -> None:
        """Notes bundles whose bytes are synced."""


class ShardWriter:
    """Writes rows at their planned places. Each process has one, which its threads share.

    Args:
        directory: the directory with all shards.
        layout: the places of all tensors.
        owner: the run that the directory belongs to, asked at each write whether it still does; None for a directory
            that nobody else knows.
    """

    def __init__(self, directory: Path, layout: Layout, owner: Owner | None = None) -> None:
        self._directory = directory
        self._places = layout.places
        self._owner = owner
        self._mutex = threading.Lock()
        self._files = OpenFiles(before=os.fdatasync)  # NFS tells of a failed write when the file is synced or closed
        # A lock for each file: threads that wait for the kernel's own lock would spin.
        self._turns = {shard.file_name: threading.Lock() for shard in layout.shards}
        self._unsynced: dict[str, int] = {}  # file → bytes since the last sync
        self._done: list[str] = []  # since the last sync
        self._syncing: Future[None] | None = None
        self._background = ThreadPoolExecutor(1, "sync")

    def write(self, name: str, rows: Tensor, first: int = 0) -> None:
        """Writes rows of a planned tensor, or all of it.

        Args:
            name: name of the tensor.
            rows: `[n, …]`, or one row without its first dim, or a whole tensor without dims.
            first: index of the first of these rows.

        Raises:
            ValueError: the rows do not fit the planned tensor: a bug, not a user's mistake.
            WriteError: the disk is full or fails, or another run has taken the directory over.
            CheckpointError: the rows are a view of a source file that became shorter.
        """
        shard, at = self._places[name]
        planned, given = shard.specs[name], TensorSpec.of(rows)
        if len(given.shape) < len(planned.shape):
            given = TensorSpec((1, *given.shape), given.dtype)
        count = first + (given.shape[0] if given.shape else 0)
        fits = given.shape[1:] == planned.shape[1:] and count <= (planned.shape[0] if planned.shape else 0)
        if given.dtype != planned.dtype or not fits:
            raise ValueError(f"{name}: planned {planned}, given {given} at row {first}")
        at += first * TensorSpec(planned.shape[1:], planned.dtype).nbytes
        data = memoryview(rows.detach().cpu().contiguous().reshape(-1).view(uint8).numpy())
        file_name, size = shard.file_name, len(data)
        with self._turns[file_name], explaining(self._directory / file_name):
            file = self._open(file_name)
            if self._owner is not None:  # after opening: the file may be of a run that came later
                self._owner.check_mine()
            try:
                while data:
                    written = os.pwrite(file.number, data, at)
                    data, at = data[written:], at + written
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                raise CheckpointError(
                    f"{name} cannot be read any more: a source file became shorter while it was read, or the disk "
                    "failed: copy it again, and leave it as it is until the command ends"
                ) from error
        with self._mutex:
            self._unsynced[file_name] = self._unsynced.get(file_name, 0) + size

    def done(self, bundle: str) -> None:
        """Reports that a bundle is written; it enters the journal once it is synced."""
        with self._mutex:
            self._done.append(bundle)
            idle = self._syncing is None or self._syncing.done()
            if sum(self._unsynced.values()) < _SYNC_BYTES or not idle:
                return
            if self._syncing is not None:
                self._syncing.result()  # raises if it failed
            self._syncing = self._background.submit(self._sync)

    def close(self) -> None:
        """Syncs everything to the disk and closes the files."""
        try:
            if self._syncing is not None:
                self._syncing.result()
            self._sync()
        finally:
            self._background.shutdown()
            self._files.close()

    def _sync(self) -> None:
        with self._mutex:
            done, self._done = self._done, []
            names, self._unsynced = list(self._unsynced), {}
        for name in names:
            with explaining(self._directory / name):
                os.fdatasync(self._open(name).number)
        if done and self._owner is not None:
            self._owner.note_done(done)

    def _open(self, file_name: str) -> Descriptor:
        path = self._directory / file_name
        return self._files.get(file_name, lambda: os.open(path, os.O_WRONLY | os.O_NOFOLLOW))
