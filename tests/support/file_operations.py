"""Every operation of the program on files below a directory, so that any of them can fail, or be the last."""

import builtins
import fcntl
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from amaxbridge.export.disk import atomic_move

_OF_OS = (
    "open", "mkdir", "rename", "replace", "unlink", "rmdir", "listdir", "scandir", "pwrite", "write", "fsync",
    "fdatasync", "posix_fallocate", "ftruncate",
)  # fmt: skip


class Counter:
    """Numbers the operations, from 0, and calls `reached` before each with its name and number."""

    def __init__(self, below: Path, reached: Callable[[str, int], None]) -> None:
        self._below, self._reached = str(below), reached
        self._mutex = threading.Lock()
        self._count = 0
        self._busy = threading.local()

    def meet(self, name: str, first: Any) -> None:
        """Counts an operation on a path below the directory, or on an open file that lies there."""
        if getattr(self._busy, "now", False):
            return
        self._busy.now = True
        try:
            ours = self._is_below(first)
        finally:
            self._busy.now = False
        if ours:
            with self._mutex:
                number, self._count = self._count, self._count + 1
            self._reached(name, number)

    def _is_below(self, first: Any) -> bool:
        try:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        except (TypeError, OSError):
            return False
        return str(path).startswith(self._below)


@contextmanager
def watched(below: Path, reached: Callable[[str, int], None]) -> Iterator[None]:
    """Calls `reached` before each operation on files whose paths begin with `below`."""
    counter = Counter(below, reached)

    def watching(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(first: Any, *more: Any, **named: Any) -> Any:
            counter.meet(name, first)
            return real(first, *more, **named)

        return operation

    with ExitStack() as stack:
        for name in _OF_OS:
            stack.enter_context(patch.object(os, name, watching(name, getattr(os, name))))
        opened = watching("open", io.open)
        stack.enter_context(patch.object(builtins, "open", opened))
        stack.enter_context(patch.object(io, "open", opened))
        stack.enter_context(patch.object(fcntl, "flock", watching("flock", fcntl.flock)))
        stack.enter_context(patch.object(atomic_move, "_exchange", watching("exchange", atomic_move._exchange)))
        yield
