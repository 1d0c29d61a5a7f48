"""Progress of long work: a bar on a terminal, elsewhere a log line each minute.

Of several ranks, the first shows its own share and says so; bundles are spread so that all ranks have about the same.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from amaxbridge.bridge.live.process_ranks import world_size
from amaxbridge.cli import speaks
from amaxbridge.export.progress import NoProgress, Progress

_LOG_SECONDS = 60
_log = logging.getLogger("amaxbridge")


class Meter:
    """Counts finished work and computes the speed.

    Args:
        show: called after every change, by one thread at a time.
        clock: returns seconds.
    """

    def __init__(self, show: Callable[["Meter"], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._mutex = threading.Lock()
        self.tensors = self.all_tensors = 0
        self.nbytes = self.all_nbytes = self._kept = 0
        self._started = clock()

    def begin(self, *, tensors: int, nbytes: int, kept: int = 0) -> None:
        with self._mutex:
            self.all_tensors, self.all_nbytes = tensors, nbytes
            self.nbytes = self._kept = kept
            self._started = self._clock()
            self._show(self)

    def advance(self, *, tensors: int, nbytes: int) -> None:
        with self._mutex:
            self.tensors += tensors
            self.nbytes += nbytes
            self._show(self)

    def __str__(self) -> str:
        speed = self._speed
        left = "?" if not speed else timedelta(seconds=round((self.all_nbytes - self.nbytes) / speed))
        return (
            f"{self.nbytes / 1e9:,.1f} of {self.all_nbytes / 1e9:,.1f} GB, "
            f"{self.tensors:,} of {self.all_tensors:,} tensors, {speed / 1e9:.2f} GB/s, {left} left"
        )

    @property
    def _speed(self) -> float:
        """Bytes a second, not counting what an earlier run did."""
        seconds = self._clock() - self._started
        return (self.nbytes - self._kept) / seconds if seconds else 0.0


class EachMinute:
    """Logs a meter once a minute; work of less than a minute logs nothing."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock = what, clock
        self._last = clock()

    def __call__(self, meter: Meter) -> None:
        now = self._clock()
        if now - self._last >= _LOG_SECONDS:
            self._last = now
            _log.info("%s: %s", self._what, str(meter))  # as it is now


@contextmanager
def progress(what: str, console: Console | None = None) -> Iterator[Progress]:
    """Context in which the first of the ranks that share a terminal shows progress."""
    console = console or Console(stderr=True)
    if world_size() > 1:
        what += f", one of {world_size()} equal shares"
    if not speaks():
        yield NoProgress()
    elif not console.is_interactive:
        yield Meter(EachMinute(what))
    else:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[meter]}")
        with Bars(*columns, console=console, transient=True) as bars:
            task = bars.add_task(what, total=None, meter="")
            yield Meter(
                lambda meter: bars.update(task, completed=meter.nbytes, total=meter.all_nbytes, meter=str(meter))
            )
