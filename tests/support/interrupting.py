"""Signals sent to this process at one moment of a command, and what must hold afterwards: nothing of the user's is
lost, one message says what is kept, and the next run ends with the bytes of one that was never disturbed.
"""

import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.export.disk import staging
from amaxbridge.export.disk.staging import StagedDirectory
from amaxbridge.export.output import finished_directory
from amaxbridge.export.output.finished_directory import BundleWriter

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "interrupted by SIGTERM", signal.SIGHUP: "interrupted by SIGHUP"}
OLD = {"config.json": b"{}", "notes.txt": b"mine"}

UNTOUCHED, NOTHING, KEPT, IN_PLACE = "", "nothing was written at", "keeps", "is in place"


@dataclass(frozen=True, slots=True)
class Moment:
    """One call of a function.

    Attributes:
        call: which of its calls.
        before: the signal comes before the call; else after it.
        says: what the message tells of the output.
    """

    place: Any
    name: str
    call: int = 1
    before: bool = True
    says: str = KEPT


PLANNING = {"planning": Moment(finished_directory, "plan_fingerprint", says=UNTOUCHED)}
WRITING = {
    "allocating": Moment(staging, "check_room", says=NOTHING),
    "writing": Moment(BundleWriter, "write", 4, before=False),
    "small files": Moment(StagedDirectory, "write_file"),
    "verifying": Moment(finished_directory, "verify"),
}
SAVING_MEGATRON = {
    "reading": Moment(AutoBridge, "load_from", before=False, says=UNTOUCHED),
    "opening": Moment(StagedDirectory, "open", before=False),
}
ENDING = {
    "before the commit": Moment(StagedDirectory, "commit"),
    "syncing": Moment(staging, "sync_tree", before=False),
    "complete": Moment(StagedDirectory, "_move", says=IN_PLACE),
    "moving": Moment(staging, "move_into_place", before=False, says=IN_PLACE),
    "removing the old": Moment(staging.shutil, "rmtree", says=IN_PLACE),
}

type Run = Callable[[Path], tuple[int, str]]
"""Writes, or replaces, an output; returns the exit status and what was printed on standard error."""


@contextlib.contextmanager
def as_in_a_terminal() -> Iterator[None]:
    """Handlers as a terminal gives them: after `nohup … &`, signals are ignored from the start."""
    started = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in started.items():
        signal.signal(number, handler)


def check_interrupted(run: Run, root: Path, moment: Moment, number: signal.Signals, *, continues: bool = True) -> None:
    """Interrupts a command that replaces an output, then lets it run undisturbed.

    Args:
        run: the command.
        root: an empty directory, for the output.
        continues: True if a later run goes on where this one was.
    """
    out = root / "out"
    says = NOTHING if moment.says == KEPT and not continues else moment.says
    undisturbed(run, out)
    whole = files(out)
    shutil.rmtree(out)
    out.mkdir()
    for name, content in OLD.items():
        (out / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, moment, number)
        status, said = run(out)
    assert status == STATUS[number], said
    first, *notes = [line for line in said.splitlines() if not line.startswith(("INFO", "WARNING"))]
    assert first == f"error: {SAID[number]}"
    told = {UNTOUCHED: [], NOTHING: [NOTHING], KEPT: [NOTHING, KEPT], IN_PLACE: [IN_PLACE]}[says]
    assert len(notes) == len(told) and all(map(str.__contains__, notes, told)), said
    assert files(out) == (whole if says == IN_PLACE else OLD)
    assert out.with_name("out.partial").exists() == (says == KEPT)
    undisturbed(run, out)
    assert files(out) == whole
    assert [path.name for path in root.iterdir()] == ["out"]


def undisturbed(run: Run, out: Path) -> None:
    status, said = run(out)
    assert status == 0, said


def files(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, by its path there, but for `.metadata`: each save of torch has an id of its own."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != ".metadata"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def send_at(patch: pytest.MonkeyPatch, moment: Moment, number: signal.Signals) -> None:
    """Sends this process a signal at a moment to come."""
    real, calls = getattr(moment.place, moment.name), itertools.count(1)

    def sending(*args: Any, **keywords: Any) -> Any:
        here = next(calls) == moment.call  # workers call it, too
        if here and moment.before:
            os.kill(os.getpid(), number)
        made = real(*args, **keywords)
        if here and not moment.before:
            os.kill(os.getpid(), number)
        return made

    patch.setattr(moment.place, moment.name, sending)
