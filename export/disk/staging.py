"""The directory that an output grows in, so that the target is whole or untouched, and an interrupted run can go on.

Everything goes to a staging directory beside the target, `OUT.partial`. Shards are made there at full size; ranks and
threads then write rows of tensors at the planned offsets, in any order. What is on the disk for good is noted in
journals, bundle by bundle, after the data is synced: a run of the same plan takes up what they name and makes only the
rest. At the end one move puts the directory into place.

    OUT.partial/.plan               the fingerprint of everything that decides the bytes
    OUT.partial/.done-RANK-of-N     the bundles that a process has written and synced, a line each; it holds the file
    OUT.partial.lock                held by the process that opens, ends or removes the directory

Processes that share the work never talk: this is where they meet. Each computes the same plan and writes what is its
part of it. Whoever finds that the journals name every bundle ends the work, while others who arrive wait for the lock.
So nothing needs to be known of the other processes, but whether one is at work: it holds its journal until it dies.
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
_AT_ONCE = 8  # shards to make room for: where the file system is memory, that takes as long as writing
_BYTES = "1"  # another number where this program makes other bytes of the same plan


@dataclass(frozen=True, slots=True)
class Share:
    """Which of the processes that share a work this is.

    Raises:
        UsageError: there is no such rank.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"RANK={self.rank} of WORLD_SIZE={self.world}: ranks are 0 to {self.world - 1}")


ALONE = Share()


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
    """A directory that becomes `target` in one move.

    As a context it goes away at the end, unless it was committed, another process is at work in it, or something is
    done that another run can go on from.

    Args:
        target: what is to be written.
        plan: names everything that decides the bytes; None where a second run could not know that they are the same.
        share: of the processes that open it.
        output: names all that the output is made from, as its record does: by it a process that comes late knows that
            the others have made it.
        overwrite: whether a target that is there by then may be replaced.
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
        """Where this process notes what it has done; None where no other run could go on from it."""
        return self._journal if self._plan is not None else None

    def open(self, layout: Layout) -> frozenset[str] | None:
        """Makes the directory with every shard at full size, or takes up the one that others made by the same plan.

        Returns:
            The bundles that are done; None where the other processes have put all of it into place already.

        Raises:
            OutputExistsError: another run is writing to it, or another process is this rank.
            UsageError: it cannot be made.
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
            os.ftruncate(self._held, self._journal.read_bytes().rfind(b"\n") + 1)  # a line that was not ended
            return frozenset(self._done())
        finally:
            self._mutex.release()

    def write_file(self, name: str, content: bytes) -> None:
        """Writes one small file, synced; `name` may lie in a sub-directory."""
        with self._created(name) as file:
            file.write(content)

    def left(self, bundles: Collection[str]) -> int | None:
        """How many of all bundles no process has written. If none, this one must end it: the others are kept waiting.

        Returns:
            None where another process has put the directory into place.

        Raises:
            WriteError: another process was to end it and gave it up.
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
        """Moves the directory to the target, replacing what was there, in one step."""
        self._mutex.acquire()
        for note in (self.path / _PLAN, *self._journals()):
            note.unlink(missing_ok=True)
        sync_directory(self.path)
        replace_directory(self.path, self.target)
        self._close()

    def discard(self) -> None:
        """Removes the staging directory with all that is in it."""
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
            error.add_note(f"{self.path} keeps {kept:,} parts that are done: the same command goes on from there")
        if not kept and is_at(self._held, self._journal) and (self._ending or not self._others()):
            self._clear()
        self._close()

    def _resumable(self, error: BaseException | None) -> bool:
        """Whether the same plan may do better the next time: not where all of its work is one that fails."""
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
        if self._plan is not None:  # last: a directory with a plan has all its shards
            self.write_file(_PLAN, self._plan.encode())

    def _make_shard(self, shard: Shard) -> None:
        with self._created(shard.file_name) as file:
            os.posix_fallocate(file.fileno(), 0, shard.nbytes)  # a full disk shows before the work
            file.write(shard.header)

    def _is_made(self) -> bool:
        """Whether the other processes have put it into place. One process has no others."""
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
        """The journals of other processes that are at work."""
        return [path.name for path in self._journals() if not is_at(self._held, path) and is_held(path)]

    def _journals(self) -> list[Path]:
        return list(self.path.glob(_JOURNAL + "*"))

    def _done(self) -> Iterator[str]:
        for journal in self._journals():
            for line in journal.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else it is being written, or the run ended meanwhile
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
        (self.path / _PLAN).unlink(missing_ok=True)  # first: what is left without it is nothing to go on from
        if self.path.exists():
            shutil.rmtree(self.path)

    def _close(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        self._mutex.release()
