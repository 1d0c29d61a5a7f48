"""The files that a command reads, as they were at its start.

A source that changes while it is read would become a mixture: some weights of one model, some of another. So every
command notes what it reads before it reads it, and compares at the end; and what an interrupted run has written counts
for the next one only if the source is still the same.

A file is the same if its inode, size, times and safetensors header are. The time of the last change of an inode
(ctime) cannot be set back. File systems that make up inodes or times, as mounts of object stores may, need `hashed`:
then a file is the same if its bytes are. A file that is not there must still be absent at the end.

The kernel's clock for these times stands still for up to 10 ms, in which a second change leaves no trace. So a file
that was changed just now is noted a little later.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from amaxbridge.export.disk.input_files import open_input
from amaxbridge.export.disk.io_errors import explaining_reads
from amaxbridge.mappings.errors import CheckpointError, listing

_AT_ONCE = 8
_MAX_HEADER = 100_000_000
_TICK_NS = 20_000_000  # twice the longest tick of Linux, at 100 Hz
_CHANGED = 2  # place of ctime in a state

type _State = tuple[int | str, ...]

_ABSENT: _State = ()


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """Files of one directory.

    Args:
        directory: the directory.
        states: path in the directory → what tells the file from a changed one.
        hashed: True to tell by the hash of all bytes, False by inode, size, times and header.
    """

    directory: Path
    states: Mapping[str, _State]
    hashed: bool

    @classmethod
    def of(cls, directory: Path, names: Iterable[str], *, hashed: bool = False) -> Self:
        """The files as they are now; those that are not there are noted, too.

        Raises:
            CheckpointError: one of them cannot be read.
        """
        listed = sorted(set(names))

        def state(name: str) -> _State:
            return _settled(directory / name, hashed=hashed)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return cls(directory, dict(zip(listed, pool.map(state, listed), strict=True)), hashed)

    @property
    def fingerprint(self) -> str:
        """Names the files with their states: a file that was written anew is another."""
        return hashlib.sha256(json.dumps(list(self.states.items())).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raises CheckpointError if files have changed since; all are named."""
        changed = [name for name in self.states if not self._is_same(name)]
        if changed:
            raise CheckpointError(
                f"{self.directory}: {len(changed)} files changed while they were read, so they are of two versions:"
                f"{listing(changed)}\nLet nothing write there, and run the same command again"
            )

    def _is_same(self, name: str) -> bool:
        try:
            return _state(self.directory / name, hashed=self.hashed) == self.states[name]
        except CheckpointError:  # it cannot be read any more
            return False


@dataclass(frozen=True, slots=True)
class SeveralSources:
    """Files of several directories, and what was decided about them.

    Args:
        parts: the files of each directory.
        decided: what else tells one run from another.
    """

    parts: tuple[SourceFiles, ...]
    decided: str

    @property
    def fingerprint(self) -> str:
        """As `SourceFiles.fingerprint`."""
        return hashlib.sha256(
            json.dumps([self.decided, *(each.fingerprint for each in self.parts)]).encode()
        ).hexdigest()

    def check_unchanged(self) -> None:
        """As `SourceFiles.check_unchanged`."""
        for each in self.parts:
            each.check_unchanged()


def _settled(path: Path, *, hashed: bool) -> _State:
    """The state of a file that has not changed within this tick of the kernel's clock."""
    state = _state(path, hashed=hashed)
    for _ in range(3):  # a file that is written to all the time is noticed at the end
        if hashed or state == _ABSENT or not 0 <= time.time_ns() - int(state[_CHANGED]) < _TICK_NS:
            break
        time.sleep(_TICK_NS / 1e9)
        state = _state(path, hashed=hashed)
    return state


def _state(path: Path, *, hashed: bool) -> _State:
    try:
        number = open_input(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return _ABSENT
        raise
    with explaining_reads(path), open(number, "rb") as file:
        found = os.fstat(number)
        if hashed:
            return found.st_size, hashlib.file_digest(file, "sha256").hexdigest()
        header = b""
        if path.suffix == ".safetensors":
            header = file.read(8)
            header += file.read(min(int.from_bytes(header, "little"), _MAX_HEADER))
    times = found.st_mtime_ns, found.st_ctime_ns
    return found.st_size, *times, found.st_ino, hashlib.sha256(header).hexdigest()
