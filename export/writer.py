"""Writing a checkpoint so that the target is whole or untouched, and an interrupted run can go on.

Everything goes to a staging directory beside the target, `OUT.partial`. Shards are made there at full size; ranks and
threads then write rows of tensors at the planned offsets, in any order. What is on the disk for good is noted in a
journal, bundle by bundle, after the data is synced: a run of the same plan takes up what the journal names and makes
only the rest. At the end one move puts the directory into place.

    OUT.partial/.plan          the fingerprint of everything that decides the bytes
    OUT.partial/.done-RANK     the bundles that a process has written and synced, a line each

Syncing goes on beside the writing, on a thread of its own, so that the disk works while weights are quantized.
Several processes may write one shard: they must see the same file system.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from torch import Tensor, uint8

from export.exchange import replace_directory, restore_previous
from export.layout import Layout
from mappings.errors import AmaxbridgeError, OutputExistsError, UsageError, WriteError
from mappings.tensors import TensorSpec

_PLAN = ".plan"
_JOURNAL = ".done-"
_SYNC_BYTES = 64 << 20
_BYTES = "1"  # another number where this program makes other bytes of the same plan
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError when `output` holds anything and may not be replaced."""
    restore_previous(output)
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output {output} exists and is not a directory")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputExistsError(f"output {output} exists and is not empty; choose another or give io.overwrite=true")


def plan_fingerprint(source: str, decisions: str, layout: Layout) -> str:
    """Names everything that decides the bytes: what is read, what is made of it, where it lies."""
    parts = [_BYTES, source, decisions, *(shard.header[8:].decode() for shard in layout.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class StagedDirectory:
    """A directory that becomes `target` in one move. Used by one process: the others only write into `path`.

    As a context it goes away at the end, unless it was committed, or was interrupted and another run can go on.

    Args:
        target: what is to be written.
        plan: names everything that decides the bytes; None where a second run could not know that they are the same.
    """

    def __init__(self, target: Path, plan: str | None = None) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self._plan = plan
        self._lock = -1

    def open(self, layout: Layout) -> frozenset[str]:
        """Makes the staging directory with every shard at full size, or takes up one that the same plan left.

        Returns:
            The bundles that are done.

        Raises:
            OutputExistsError: another run is writing to it.
            UsageError: it cannot be made.
            WriteError: the disk has too little room.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be made: {error.strerror}; choose another output") from error
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise OutputExistsError(f"another run is writing {self.path}: wait for it, or stop it") from error
        plan = self.path / _PLAN
        if self._plan is not None and plan.is_file() and plan.read_text() == self._plan:
            return frozenset(self._journals())
        for left in self.path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        room, needed = shutil.disk_usage(self.path).free, sum(shard.nbytes for shard in layout.shards)
        if needed > room:
            raise WriteError(f"{self.path}: {needed:,} bytes are to be written, the disk has room for {room:,}")
        for shard in layout.shards:
            with self._created(shard.file_name) as file:
                os.posix_fallocate(file.fileno(), 0, shard.nbytes)  # a full disk shows before the work
                file.write(shard.header)
        if self._plan is not None:  # last: a directory with a plan has all its shards
            self.write_file(_PLAN, self._plan.encode())
        return frozenset()

    def write_file(self, name: str, content: bytes) -> None:
        """Writes one small file, synced; `name` may lie in a sub-directory."""
        with self._created(name) as file:
            file.write(content)

    def commit(self) -> None:
        """Moves the directory to the target, replacing what was there, in one step."""
        for note in (self.path / _PLAN, *self.path.glob(_JOURNAL + "*")):
            note.unlink(missing_ok=True)
        os.fsync(self._lock)
        replace_directory(self.path, self.target)
        self._unlock()

    def discard(self) -> None:
        """Removes the staging directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock < 0:  # committed, or never opened
            return
        resumable = isinstance(error, WriteError) or not isinstance(error, AmaxbridgeError)
        kept = len(set(self._journals())) if self._plan is not None and resumable else 0
        if kept:
            if error is not None:
                error.add_note(f"{self.path} keeps {kept:,} parts that are done: the same command goes on from there")
            self._unlock()
        else:
            self.discard()

    def _journals(self) -> Iterator[str]:
        for journal in self.path.glob(_JOURNAL + "*"):
            for line in journal.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else the run ended while it wrote the line
                    yield json.loads(line)

    @contextlib.contextmanager
    def _created(self, name: str) -> Iterator[BinaryIO]:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _explaining(path), open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class ShardWriter:
    """Writes rows at their planned places. One for each process; its threads share it.

    Args:
        directory: the staging directory, with all shards.
        rank: of this process among those that write.
    """

    def __init__(self, directory: Path, layout: Layout, rank: int = 0) -> None:
        self._directory = directory
        self._places = layout.places
        self._mutex = threading.Lock()
        self._files: dict[str, int] = {}
        self._turns = {shard.file_name: threading.Lock() for shard in layout.shards}  # the kernel's own lock spins
        self._done: list[str] = []  # since the last sync
        self._unsynced = 0
        self._journal = directory / f"{_JOURNAL}{rank}"
        self._syncing: Future[None] | None = None
        self._background = ThreadPoolExecutor(1, "sync")

    def write(self, name: str, rows: Tensor, first: int = 0) -> None:
        """Writes rows of a planned tensor, or all of it.

        Args:
            rows: `[some, …]`, or one row without its first dim, or a whole tensor without dims.
            first: the number of the first of these rows.

        Raises:
            ValueError: the tensor is not the planned one; a fault of the program, not of the user.
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
        with self._turns[shard.file_name], _explaining(self._directory / shard.file_name):
            while data:
                written = os.pwrite(file, data, at)
                data, at = data[written:], at + written
        with self._mutex:
            self._unsynced += size

    def done(self, bundle: str) -> None:
        """Notes that all of a bundle is written; it is in the journal once it is synced."""
        with self._mutex:
            self._done.append(bundle)
            idle = self._syncing is None or self._syncing.done()
            if self._unsynced < _SYNC_BYTES or not idle:
                return
            if self._syncing is not None:
                self._syncing.result()  # raises what went wrong
            self._unsynced = 0
            self._syncing = self._background.submit(self._sync)

    def close(self) -> None:
        """Syncs what was written to the disk and closes the files."""
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
            with _explaining(self._directory / name):
                os.fdatasync(file)
        if done:
            with _explaining(self._journal), open(self._journal, "a") as journal:
                journal.writelines(json.dumps(bundle) + "\n" for bundle in done)
                journal.flush()
                os.fsync(journal.fileno())

    def _open(self, file_name: str) -> int:
        with self._mutex:
            if file_name not in self._files:
                self._files[file_name] = os.open(self._directory / file_name, os.O_WRONLY)
            return self._files[file_name]


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise WriteError(f"{path}: {os.strerror(error.errno)}; free space and run the same command again") from error
