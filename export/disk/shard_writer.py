"""Writing rows at their places in the shards of a staging directory, and journalling what is safely on the disk.

A thread of its own syncs, so that the disk works while weights are quantized. Several processes on one file system may
write the same shard.
"""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor, uint8

from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.mappings.errors import WriteError
from amaxbridge.mappings.tensors import TensorSpec

_SYNC_BYTES = 64 << 20
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class ShardWriter:
    """Writes rows at their planned places. Each process has one, which its threads share.

    Args:
        directory: the staging directory, with all shards.
        layout: the places of all tensors.
        journal: file that lists the bundles whose bytes are synced; None to keep no journal.
    """

    def __init__(self, directory: Path, layout: Layout, journal: Path | None = None) -> None:
        self._directory = directory
        self._places = layout.places
        self._mutex = threading.Lock()
        self._files: dict[str, int] = {}
        # A lock for each file: threads that wait for the kernel's own lock would spin.
        self._turns = {shard.file_name: threading.Lock() for shard in layout.shards}
        self._done: list[str] = []  # since the last sync
        self._unsynced = 0
        self._journal = journal
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
            WriteError: the disk is full.
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
        file, size = self._open(shard.file_name), len(data)
        with self._turns[shard.file_name], explaining(self._directory / shard.file_name):
            while data:
                written = os.pwrite(file, data, at)
                data, at = data[written:], at + written
        with self._mutex:
            self._unsynced += size

    def done(self, bundle: str) -> None:
        """Reports that a bundle is written; it enters the journal once it is synced."""
        with self._mutex:
            self._done.append(bundle)
            idle = self._syncing is None or self._syncing.done()
            if self._unsynced < _SYNC_BYTES or not idle:
                return
            if self._syncing is not None:
                self._syncing.result()  # raises if it failed
            self._unsynced = 0
            self._syncing = self._background.submit(self._sync)

    def close(self) -> None:
        """Syncs everything to the disk and closes the files."""
        try:
            if self._syncing is not None:
                self._syncing.result()
            self._sync()
        finally:
            self._background.shutdown()
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def _sync(self) -> None:
        with self._mutex:
            done, self._done = self._done, []
            files = dict(self._files)
        for name, file in files.items():
            with explaining(self._directory / name):
                os.fdatasync(file)
        if done and self._journal is not None:
            with explaining(self._journal), open(self._journal, "a") as journal:
                journal.writelines(json.dumps(bundle) + "\n" for bundle in done)
                journal.flush()
                os.fsync(journal.fileno())

    def _open(self, file_name: str) -> int:
        with self._mutex:
            if file_name not in self._files:
                self._files[file_name] = os.open(self._directory / file_name, os.O_WRONLY)
            return self._files[file_name]


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turns the OSError of a full disk into a WriteError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise WriteError(f"{path}: {os.strerror(error.errno)}; free space and run the same command again") from error
