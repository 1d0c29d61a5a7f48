"""The staging directory, in which an output grows: the target is whole or untouched, and an interrupted run can
continue.

Shards are created there at full size; ranks and threads then write rows of tensors at the planned offsets, in any
order. Journals list the bundles whose bytes are synced. A later run of the same plan keeps these and makes only the
rest. When all is written, verified and synced, the directory is marked complete, and one move puts it into place; if
that fails, the next run only moves. `output_place` says where the directory lies, `atomic_move` how it moves.

    OUT.partial/.amaxbridge.lock    tells that the directory is ours; locked by who opens, completes or removes it
    OUT.partial/.plan               the fingerprint of everything that decides the bytes
    OUT.partial/.done-RANK-of-N     the bundles that a process has written and synced, one a line; locked by the process
    OUT.partial/.complete           the inode of `new` once it is complete: what is there after the move is another
    OUT.partial/new                 the output

Processes that share the work never talk; they meet here. Each computes the same plan and writes its own share. The
process that finds every bundle in the journals completes the work, while later ones wait for the lock. All that must be
known about another process is that it is running: it holds the lock on its journal until it dies. A process knows that
the directory is still its own by its journal, which is where it was.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from amaxbridge.export.disk.atomic_move import NEW, is_moving, move_into_place, raise_it, sync_directory, sync_tree
from amaxbridge.export.disk.file_locks import Mutex, hold, is_at, is_held
from amaxbridge.export.disk.input_files import open_input
from amaxbridge.export.disk.io_errors import explaining
from amaxbridge.export.disk.output_place import MARK, check_ours, contents, must_stay, staging_directory
from amaxbridge.export.disk.shard_layout import Layout, Shard
from amaxbridge.export.output.provenance import made_from
from amaxbridge.interrupts import uninterrupted
from amaxbridge.mappings.errors import AmaxbridgeError, CheckpointError, OutputExistsError, UsageError, WriteError

_PLAN = ".plan"
_COMPLETE = ".complete"
_JOURNAL = ".done-"
_AT_ONCE = 8  # shards to allocate in parallel: on tmpfs, allocating takes as long as writing
_MOST_OF_A_NOTE = 256 << 20
_BYTES = "1"  # changes when the program makes different bytes from the same plan
_CANNOT_BE_MADE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL,
)  # fmt: skip

_log = logging.getLogger("amaxbridge")

type Content = bytes | Iterable[bytes]
"""What a file holds, whole or in parts."""


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
    """Raises OutputExistsError if `output` must not be replaced, or if something else has the staging directory's name;
    UsageError if it cannot be replaced.

    Args:
        output: the directory, as `resolved_output` returns it.
    """
    staging = staging_directory(output)
    check_ours(staging)
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output {output} exists and is not a directory")
    if output.is_dir() and not os.access(output, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"output {output} is not writable for this user: make it so, or choose another output")
    if not overwrite and contents(output) and not is_moving(staging):
        raise OutputExistsError(f"output {output} exists and is not empty; choose another or give overwrite=True")


def check_room(directory: Path, nbytes: int) -> None:
    """Raises WriteError if the disk of a directory, which need not exist, has no room for so many bytes."""
    existing = next(each for each in (directory, *directory.parents) if each.is_dir())
    room = shutil.disk_usage(existing).free
    if nbytes > room:
        raise WriteError(
            f"{directory}: {nbytes:,} bytes are to be written, the disk has room for {room:,}: free space, or choose "
            "another output"
        )


def plan_fingerprint(source: str, decisions: str, layout: Layout) -> str:
    """A hash of everything that decides the bytes: what is read, what is made of it, and where it lies."""
    parts = [_BYTES, source, decisions, *(shard.header[8:].decode() for shard in layout.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class StagedDirectory:
    """A directory that becomes `target` in one move.

    As a context manager it removes itself at the end, unless it was committed, another process is working in it, it is
    complete, or it holds bundles that another run can continue from.

    Args:
        target: the directory to write, as `resolved_output` returns it.
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
        self._plan, self._share, self._output, self._overwrite = plan, share, output, overwrite
        self._held = -1
        self._joined = False
        self._ending = False
        self._in_place = False
        self._settle(staging_directory(target))

    @property
    def path(self) -> Path:
        """The directory in which the output grows."""
        return self.root / NEW

    @property
    def journal(self) -> Path:
        """The journal of this process."""
        return self.root / f"{_JOURNAL}{self._share.rank}-of-{self._share.world}"

    @property
    def is_complete(self) -> bool:
        """True if only the move is missing."""
        with contextlib.suppress(OSError, ValueError, WriteError):
            return int(_read(self.root / _COMPLETE)) == _inode(self.path)
        return False

    def open(self, layout: Layout) -> frozenset[str] | None:
        """Creates the directory with every shard at full size, or continues one that was made by the same plan.

        Returns:
            The bundles that are done; None if the other processes have already moved the output into place.

        Raises:
            OutputExistsError: another run is writing to it, another process has the same rank, or something else has
                its name.
            UsageError: the directory cannot be created.
            WriteError: the disk has too little room or fails, or no locks for several processes.
        """
        self._enter()
        try:
            with explaining(self.root):
                if self._is_made():
                    return None
                self._refuse_others()
                continues = self._continues()
                if is_moving(self.root) and self.is_complete and not continues:
                    self._move()  # the move of an earlier run was cut short
                if not self._overwrite and not (continues and self.is_complete):
                    check_output(self.target, overwrite=False)
                if not continues or not self._is_whole(layout):
                    self._make(layout)
                self._held = hold(self.journal, required=self._share.world > 1)
                os.ftruncate(self._held, _read(self.journal).rfind(b"\n") + 1)  # drops a line that was cut short
                os.lseek(self._held, 0, os.SEEK_END)
                if must_stay(self.target):
                    _log.info(
                        "%s must stay, so the files will be moved into it one by one, config.json last",
                        self.target,
                    )
                return frozenset(self._done())
        finally:
            if self._held < 0:
                self._leave()
            self._mutex.release()

    def join(self, root: Path) -> None:
        """Joins the directory that another process has opened as `root`, to write there on its behalf."""
        self._settle(root)
        self._joined = True
        with explaining(self.journal):
            self._held = os.open(self.journal, os.O_RDONLY)

    def check_mine(self) -> None:
        """Raises WriteError if the directory was removed, or made anew by another run."""
        if not is_at(self._held, self.journal):
            raise WriteError(
                f"{self.root} was removed or made anew by another run, while this one was writing to it: this one "
                "stops. Run the same command again when no other is running"
            )

    def note_done(self, bundles: Sequence[str]) -> None:
        """Notes in the journal that bundles are written and synced."""
        if self._plan is None:  # no other run could continue from it
            return
        with explaining(self.journal):
            os.write(self._held, "".join(json.dumps(bundle) + "\n" for bundle in bundles).encode())
            os.fsync(self._held)

    def write_file(self, name: str, content: Content) -> None:
        """Writes one file of the output that is no shard; `name` may lie in a sub-directory."""
        self.check_mine()
        with self._created(self.path / name) as file:
            file.writelines([content] if isinstance(content, bytes) else content)

    def left(self, bundles: Collection[str]) -> int | None:
        """The number of bundles that no process has written. If 0, this process must complete the work; others wait.

        Returns:
            The number; None if another process has moved the output into place.

        Raises:
            WriteError: another process was completing the work and gave up.
        """
        with explaining(self.root):
            self._mutex.acquire()
            try:
                if is_at(self._held, self.journal):
                    left = len(frozenset(bundles).difference(self._done()))
                    self._ending = left == 0
                    return left
                self._leave()
            finally:
                if not self._ending:
                    self._mutex.release()
        if not self._is_made():
            raise WriteError(f"another process has given up {self.root}, which was complete: it says why")
        return None

    def commit(self) -> None:
        """Syncs everything, and moves the directory to the target in one step.

        Raises:
            OutputExistsError: without `overwrite`, something appeared at the target meanwhile.
            WriteError: the directory is not this run's any more, or the file system refuses.

        In each case the target is left as it is, and the finished output is kept. A signal that comes while it moves is
        heeded afterwards.
        """
        with explaining(self.root):
            self.check_mine()
            self._mutex.acquire()
            self.check_mine()
            if _inode(self.path) is None:
                raise WriteError(f"{self.path} was replaced by another program: run the same command again")
            if not self.is_complete:
                sync_tree(self.path)
                with self._created(self.root / _COMPLETE) as file:
                    file.write(str(_inode(self.path)).encode())
                sync_directory(self.root)
        with uninterrupted():
            self._move()
            self._in_place = True
            self._close()

    def discard(self) -> None:
        """Removes the staging directory with everything in it."""
        with explaining(self.root):
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
        if isinstance(error, KeyboardInterrupt):
            error.add_note(f"{self.target} is in place" if self._in_place else f"nothing was written at {self.target}")
        try:
            # else committed, never opened, opened by another rank, or not ours any more
            if self._held >= 0 and not self._joined and is_at(self._held, self.journal):
                with explaining(self.root):
                    self._end(error)
        except WriteError as problem:
            if error is None:
                raise
            error.add_note(f"and {problem}")
        finally:
            self._close()

    def _end(self, error: BaseException | None) -> None:
        self._mutex.acquire()
        if not is_at(self._held, self.journal):
            return
        kept = len(set(self._done())) if self._resumable(error) else 0
        if self.is_complete:
            by = "move it there yourself" if self._plan is None else "the same command only moves it"
            note = f"{self.path} is finished, and kept for {self.target}: {by}"
        elif kept:
            note = f"{self.root} keeps {kept:,} finished bundles: the same command continues from there"
        else:
            note = ""
            if self._ending or not self._others():
                self._clear()
        if error is not None and note:
            error.add_note(note)

    def _resumable(self, error: BaseException | None) -> bool:
        """True if the same plan may succeed the next time: a run that failed alone by its input never does.

        What the system refused, writing or reading, may go well then.
        """
        by_the_system = isinstance(error, WriteError) or (error and isinstance(error.__cause__, OSError))
        fails = isinstance(error, AmaxbridgeError) and not by_the_system
        others = self._share.world > 1 and not self._ending
        return self._plan is not None and (not fails or others)

    def _settle(self, root: Path) -> None:
        self.root = root
        self._mutex = Mutex(root / MARK, required=self._share.world > 1)

    def _enter(self) -> None:
        """Makes and marks the directory, and holds its mutex."""
        try:
            with explaining(self.root):
                try:
                    self.root.parent.mkdir(parents=True, exist_ok=True)
                    check_ours(self.root)
                    self._mutex.acquire()
                except OSError as error:
                    if error.errno not in _CANNOT_BE_MADE:
                        raise
                    raise UsageError(
                        f"{self.root} cannot be made: {error.filename}: {error.strerror}; choose another output"
                    ) from error
        except AmaxbridgeError:
            with contextlib.suppress(OSError):
                self.root.rmdir()  # unless something is in it
            raise

    def _leave(self) -> None:
        """Removes the directory if it holds nothing but its mark. The mutex is held."""
        with contextlib.suppress(OSError):
            if os.listdir(self.root) == [MARK]:
                (self.root / MARK).unlink()
                self.root.rmdir()

    def _move(self) -> None:
        """Moves the complete output into place, then removes what was there before."""
        with explaining(self.target):
            move_into_place(self.root, self.target, overwrite=self._overwrite)
        try:
            self._clear()
        except OSError as error:
            _log.warning(
                "%s is in place. What was there before could not all be removed from %s (%s); remove it",
                self.target,
                self.root,
                error,
            )

    def _make(self, layout: Layout) -> None:
        self._clear()
        try:
            self.path.mkdir()
            self._allocate(layout)
        except BaseException:
            self._clear()
            raise

    def _allocate(self, layout: Layout) -> None:
        check_room(self.root, sum(shard.nbytes for shard in layout.shards))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self._make_shard, layout.shards))
        sync_directory(self.path)
        if self._plan is not None:  # last, so that a directory with a plan has all its shards
            with self._created(self.root / _PLAN) as file:
                file.write(self._plan.encode())
        sync_directory(self.root)

    def _make_shard(self, shard: Shard) -> None:
        with self._created(self.path / shard.file_name) as file:
            os.posix_fallocate(file.fileno(), 0, shard.nbytes)  # so that a full disk shows before the work
            file.write(shard.header)

    def _is_made(self) -> bool:
        """True if the other processes have moved the output into place. A single process has no others."""
        return self._share.world > 1 and self._output is not None and made_from(self.target) == self._output

    def _continues(self) -> bool:
        plan = self.root / _PLAN
        return self._plan is not None and _read(plan) == self._plan.encode()

    def _is_whole(self, layout: Layout) -> bool:
        """True if all shards are there at full size. If not, everything is made anew: journals may speak of them."""
        if is_moving(self.root) and self.is_complete:
            return True
        there = _inode(self.path) is not None and not _has_links(self.path)
        damaged = [
            shard.file_name
            for shard in layout.shards
            if not there or not _has_its_size(self.path / shard.file_name, shard)
        ]
        if damaged and self._others():
            raise WriteError(
                f"{self.path} lacks {damaged[0]}, or a part of it, while other processes write there: stop them, and "
                "run all of them again"
            )
        if damaged:
            _log.warning("%s lacks %s, or a part of it: everything is made anew", self.path, ", ".join(damaged))
        return not damaged

    def _refuse_others(self) -> None:
        others, rank, world = self._others(), self._share.rank, self._share.world
        ours = self._continues() and all(name.endswith(f"-of-{world}") for name in others)
        if others and (world == 1 or not ours):
            raise OutputExistsError(f"another run is writing {self.root}: wait for it, or stop it")
        if self.journal.name in others:
            raise OutputExistsError(f"another process of rank {rank} is writing {self.root}: wait for it, or stop it")

    def _others(self) -> list[str]:
        """The journals of other running processes."""
        return [path.name for path in self._journals() if not is_at(self._held, path) and is_held(path)]

    def _journals(self) -> list[Path]:
        # not by glob, which takes a directory that cannot be read for an empty one
        return [self.root / name for name in os.listdir(self.root) if name.startswith(_JOURNAL)]

    def _done(self) -> Iterator[str]:
        for journal in self._journals():
            for line in _read(journal).splitlines(keepends=True):
                if line.endswith(b"\n"):  # else it is being written, or its run was killed
                    with contextlib.suppress(ValueError):  # damaged on the disk: its bundle is made once more
                        if isinstance(bundle := json.loads(line), str):
                            yield bundle

    @contextlib.contextmanager
    def _created(self, path: Path) -> Iterator[BinaryIO]:
        with explaining(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(path, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())

    def _clear(self) -> None:
        """Removes everything but the mark."""
        for note in (_COMPLETE, _PLAN):  # first: without them nothing is moved or continued
            (self.root / note).unlink(missing_ok=True)
        for name in os.listdir(self.root):
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif name != MARK:
                path.unlink()

    def _close(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        if self._mutex.held:
            self._leave()
        self._mutex.release()


def _read(note: Path) -> bytes:
    """One of our notes, to which another process may be writing; nothing if there is none, or far too much in it."""
    try:
        with open(open_input(note), "rb") as file:
            return file.read() if os.fstat(file.fileno()).st_size <= _MOST_OF_A_NOTE else b""
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return b""
        raise (error.__cause__ if isinstance(error.__cause__, OSError) else WriteError(str(error))) from None


def _inode(directory: Path) -> int | None:
    """The inode of a directory; None for anything else of its name, also for a link to a directory."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino if stat.S_ISDIR(found.st_mode) else None


def _has_links(directory: Path) -> bool:
    """True if anything below a directory is a link: what is written there would go elsewhere."""
    return any(
        os.path.islink(os.path.join(path, name))
        for path, directories, files in os.walk(directory, onerror=raise_it)
        for name in (*directories, *files)
    )


def _has_its_size(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with open(path, "rb") as file:
        return file.read(len(shard.header)) == shard.header
