"""The staging directory, in which an output grows: the target is whole or untouched, and an interrupted run can
continue.

Everything is written to `OUT.partial`, beside the target. Shards are created there at full size; ranks and threads then
write rows of tensors at the planned offsets, in any order. Journals list the bundles whose bytes are synced. A later
run of the same plan keeps these and makes only the rest. At the end one move puts the directory into place.

    OUT.partial/.plan               the fingerprint of everything that decides the bytes
    OUT.partial/.done-RANK-of-N     the bundles that a process has written and synced, one a line; locked by the process
    OUT.partial.lock                locked by the process that opens, completes or removes the directory

Processes that share the work never talk; they meet here. Each computes the same plan and writes its own share. The
process that finds every bundle in the journals completes the work, while later ones wait for the lock. All that must be
known
about another process is that it is running: it holds the lock on its journal until it dies.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from amaxbridge.export.disk.atomic_move import replace_directory, restore_previous, sync_directory
from amaxbridge.export.disk.file_locks import Mutex, hold, is_at, is_held
from amaxbridge.export.disk.shard_layout import Layout, Shard
from amaxbridge.export.disk.shard_writer import explaining
from amaxbridge.export.output.provenance import made_from
from amaxbridge.mappings.errors import AmaxbridgeError, OutputExistsError, UsageError, WriteError

_PLAN = ".plan"
_JOURNAL = ".done-"
_AT_ONCE = 8  # shards to allocate in parallel: on tmpfs, allocating takes as long as writing
_BYTES = "1"  # changes when the program makes different bytes from the same plan


@dataclass(frozen=True, slots=True)
class Share:
    """This process among those that share the work: rank and number of processes.

    Raises:
        UsageError: the rank is not below the number of processes.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"RANK={self.rank} of WORLD_SIZE={self.world}: ranks are 0 to {self.world - 1}")


ALONE = Share()


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError if `output` is not empty and must not be replaced."""
    restore_previous(output)
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output {output} exists and is not a directory")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputExistsError(f"output {output} exists and is not empty; choose another or give io.overwrite=true")


def plan_fingerprint(source: str, decisions: str, layout: Layout) -> str:
    """A hash of everything that decides the bytes: what is read, what is made of it, and where it lies."""
    parts = [_BYTES, source, decisions, *(shard.header[8:].decode() for shard in layout.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class StagedDirectory:
    """A directory that becomes `target` in one move.

    As a context manager it removes itself at the end, unless it was committed, another process is working in it, or it
    holds bundles that another run can continue from.

    Args:
        target: the directory to write.
        plan: fingerprint of everything that decides the bytes; None if a later run could not know that they are the
            same.
        share: this process among those that share the work.
        output: identifies what the output is made from, as `amaxbridge.json` does; a process that comes late recognizes
            by it that the others have finished.
        overwrite: True to replace a target that exists by then.
    """

    def __init__(
        self,
        target: Path,
        plan: str | None = None,
        share: Share = ALONE,
        *,
        output: str | None = None,
        overwrite: bool = True,
    ) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self._plan, self._share, self._output, self._overwrite = plan, share, output, overwrite
        self._mutex = Mutex(target.with_name(target.name + ".partial.lock"), required=share.world > 1)
        self._journal = self.path / f"{_JOURNAL}{share.rank}-of-{share.world}"
        self._held = -1
        self._ending = False

    @property
    def journal(self) -> Path | None:
        """The journal of this process; None if no other run could continue from it."""
        return self._journal if self._plan is not None else None

    def open(self, layout: Layout) -> frozenset[str] | None:
        """Creates the directory with every shard at full size, or continues one that was made by the same plan.

        Returns:
            The bundles that are done; None if the other processes have already moved the output into place.

        Raises:
            OutputExistsError: another run is writing to it, or another process has the same rank.
            UsageError: the directory cannot be created.
            WriteError: the disk has too little room, or no locks for several processes.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._mutex.acquire()
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be made: {error.filename}: {error.strerror}; choose another output"
            ) from error
        try:
            if self._is_made():
                return None
            if not self._overwrite:
                check_output(self.target, overwrite=False)
            self._refuse_others()
            if not self._continues():
                self._make(layout)
            self._held = hold(self._journal, required=self._share.world > 1)
            os.ftruncate(self._held, self._journal.read_bytes().rfind(b"\n") + 1)  # drops a line that was cut short
            return frozenset(self._done())
        finally:
            self._mutex.release()

    def write_file(self, name: str, content: bytes) -> None:
        """Writes one small file, synced; `name` may lie in a sub-directory."""
        with self._created(name) as file:
            file.write(content)

    def left(self, bundles: Collection[str]) -> int | None:
        """The number of bundles that no process has written. If 0, this process must complete the work; others wait.

        Returns:
            The number; None if another process has moved the output into place.

        Raises:
            WriteError: another process was completing the work and gave up.
        """
        self._mutex.acquire()
        if is_at(self._held, self._journal):
            left = len(frozenset(bundles).difference(self._done()))
            self._ending = left == 0
            if left:
                self._mutex.release()
            return left
        self._mutex.release()
        if not self._is_made():
            raise WriteError(f"another process has given up {self.path}, which was complete: it says why")
        return None

    def commit(self) -> None:
        """Moves the directory to the target in one step, replacing what was there."""
        self._mutex.acquire()
        for note in (self.path / _PLAN, *self._journals()):
            note.unlink(missing_ok=True)
        sync_directory(self.path)
        replace_directory(self.path, self.target)
        self._close()

    def discard(self) -> None:
        """Removes the staging directory with everything in it."""
        self._mutex.acquire()
        self._clear()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, AmaxbridgeError) and self._share.world > 1:
            error.rank = self._share.rank
        if self._held < 0:  # committed, or never opened
            return
        self._mutex.acquire()
        kept = len(set(self._done())) if self._resumable(error) else 0
        if error is not None and kept:
            error.add_note(f"{self.path} keeps {kept:,} finished bundles: the same command continues from there")
        if not kept and is_at(self._held, self._journal) and (self._ending or not self._others()):
            self._clear()
        self._close()

    def _resumable(self, error: BaseException | None) -> bool:
        """True if the same plan may succeed the next time: a run that failed alone by its input never does."""
        fails = isinstance(error, AmaxbridgeError) and not isinstance(error, WriteError)
        others = self._share.world > 1 and not self._ending
        return self._plan is not None and (not fails or others)

    def _make(self, layout: Layout) -> None:
        self._clear()
        self.path.mkdir()
        try:
            self._allocate(layout)
        except BaseException:
            self._clear()
            raise

    def _allocate(self, layout: Layout) -> None:
        room, needed = shutil.disk_usage(self.path).free, sum(shard.nbytes for shard in layout.shards)
        if needed > room:
            raise WriteError(f"{self.path}: {needed:,} bytes are to be written, the disk has room for {room:,}")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self._make_shard, layout.shards))
        if self._plan is not None:  # last, so that a directory with a plan has all its shards
            self.write_file(_PLAN, self._plan.encode())

    def _make_shard(self, shard: Shard) -> None:
        with self._created(shard.file_name) as file:
            os.posix_fallocate(file.fileno(), 0, shard.nbytes)  # so that a full disk shows before the work
            file.write(shard.header)

    def _is_made(self) -> bool:
        """True if the other processes have moved the output into place. A single process has no others."""
        return self._share.world > 1 and self._output is not None and made_from(self.target) == self._output

    def _continues(self) -> bool:
        plan = self.path / _PLAN
        return self._plan is not None and plan.is_file() and plan.read_text() == self._plan

    def _refuse_others(self) -> None:
        others, rank, world = self._others(), self._share.rank, self._share.world
        ours = self._continues() and all(name.endswith(f"-of-{world}") for name in others)
        if others and (world == 1 or not ours):
            raise OutputExistsError(f"another run is writing {self.path}: wait for it, or stop it")
        if self._journal.name in others:
            raise OutputExistsError(f"another process of rank {rank} is writing {self.path}: wait for it, or stop it")

    def _others(self) -> list[str]:
        """The journals of other running processes."""
        return [path.name for path in self._journals() if not is_at(self._held, path) and is_held(path)]

    def _journals(self) -> list[Path]:
        return list(self.path.glob(_JOURNAL + "*"))

    def _done(self) -> Iterator[str]:
        for journal in self._journals():
            for line in journal.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else it is being written, or its run was killed
                    yield json.loads(line)

    @contextlib.contextmanager
    def _created(self, name: str) -> Iterator[BinaryIO]:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with explaining(path), open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def _clear(self) -> None:
        (self.path / _PLAN).unlink(missing_ok=True)  # first: without it nothing can be continued
        if self.path.exists():
            shutil.rmtree(self.path)

    def _close(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        self._mutex.release()
