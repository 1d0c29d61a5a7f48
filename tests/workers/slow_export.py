"""`scripts/export.py` that stops after two bundles of each rank, until Ctrl-C comes."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from amaxbridge import cli
from amaxbridge.export.progress import NoProgress, Progress
from amaxbridge.scripts import progress_bar
from amaxbridge.scripts.export import export


class Stopping(NoProgress):
    def __init__(self) -> None:
        self._left = 2

    def advance(self, *, tensors: int, nbytes: int) -> None:
        sys.stdout.write("a bundle\n")  # in one piece: the ranks share a pipe
        sys.stdout.flush()
        self._left -= 1
        while self._left == 0:
            signal.pause()  # a signal that is ignored does not end it


@contextmanager
def stopping(what: str) -> Iterator[Progress]:
    yield Stopping()


if __name__ == "__main__":
    progress_bar.progress = stopping  # type: ignore[assignment]
    cli.run("export", export)
