"""Signals that ask a command to stop: Ctrl-C (SIGINT), `kill` and batch systems (SIGTERM), a closed terminal (SIGHUP).

Each becomes a KeyboardInterrupt, so that one message says what is kept, and the exit status is 128 and the number of
the signal, as in shells. SIGKILL, and a second thought about the first three, need no handling: whenever the process
ends, the output is the old one or the new one (docs/reliability.md).
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

INTERRUPTED = 128
"""Exit statuses above this are of signals."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        super().__init__(f"interrupted{by}")
        self.exit_status = INTERRUPTED + number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raises Stopped in the main thread when a signal asks for it.

    The first signal raises it. The second is taken for the same request: torchrun passes on what the terminal has sent
    to all. The third ends the process at once.

    A signal that was ignored when the process started (`nohup`) stays ignored. Under torchrun only SIGINT is handled:
    torchrun itself tells of the others, and ends ranks by SIGTERM when one has failed, which says why. SIGINT is then
    handled even if it was ignored, as after `torchrun … &`: torchrun handles it whatever it inherited, and a rank that
    kept ignoring it would be killed half a minute later, without a word on what is kept.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    heeded = [each for each in _STOPPING if signal.getsignal(each) != signal.SIG_IGN]
    count = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise Stopped(number)
        if count > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    with _handled([signal.SIGINT] if under_torchrun else heeded, stop):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back, to the end of a short block, what handlers of these signals raise. They run in the main thread alone.

    A block that fails ends in its own error.
    """
    came: list[Callable[[], None]] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number in _STOPPING if callable(handler := signal.getsignal(number))}

    def later(number: int, frame: FrameType | None) -> None:
        came.append(lambda: handlers[signal.Signals(number)](number, frame))

    with _handled(handlers, later):
        yield
    for handle in came:
        handle()


@contextlib.contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Gives signals a handler for a while."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
