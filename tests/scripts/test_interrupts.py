"""Signals that ask a command to stop, at every stage: nothing of the user's is lost, one message says what is kept, and
the next run ends with the bytes of one that was never disturbed.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from amaxbridge import cli
from amaxbridge.export.disk import staging
from amaxbridge.export.disk.staging import StagedDirectory
from amaxbridge.export.output import finished_directory
from amaxbridge.export.output.finished_directory import BundleWriter
from amaxbridge.interrupts import Stopped, stopped_by_signals, uninterrupted
from amaxbridge.scripts.export import export
from amaxbridge.scripts.quantize import quantize
from tests.support.checkpoints import dense_model, write_checkpoint
from tests.support.launcher import LiveRanks
from tests.support.paths import ENVIRONMENT

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "interrupted by SIGTERM", signal.SIGHUP: "interrupted by SIGHUP"}
OLD = {"config.json": b"{}", "notes.txt": b"mine"}

NOTHING, KEPT, IN_PLACE = "", "keeps", "is in place"
STAGES: dict[str, tuple[Any, str, int, bool, str]] = {
    # the function, which of its calls, before or after it, and what the message says
    "planning": (finished_directory, "plan_fingerprint", 1, True, NOTHING),
    "allocating": (staging, "check_room", 1, True, NOTHING),
    "writing": (BundleWriter, "write", 4, False, KEPT),
    "small files": (StagedDirectory, "write_file", 1, True, KEPT),
    "verifying": (finished_directory, "verify", 1, True, KEPT),
    "before the commit": (StagedDirectory, "commit", 1, True, KEPT),
    "syncing": (staging, "sync_tree", 1, False, KEPT),
    "complete": (StagedDirectory, "_move", 1, True, IN_PLACE),
    "moving": (staging, "move_into_place", 1, False, IN_PLACE),
    "removing the old": (staging.shutil, "rmtree", 1, True, IN_PLACE),
}

type Run = Callable[..., tuple[int, str]]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def send_at(patch: pytest.MonkeyPatch, place: Any, name: str, call: int, before: bool, number: int) -> None:
    """Sends this process a signal at one call of a function."""
    real, count = getattr(place, name), 0

    def sending(*args: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        here = count == call
        if here and before:
            os.kill(os.getpid(), number)
        made = real(*args, **keywords)
        if here and not before:
            os.kill(os.getpid(), number)
        return made

    patch.setattr(place, name, sending)


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Handlers as a terminal gives them: after `nohup … &`, signals are ignored from the start."""
    started = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in started.items():
        signal.signal(number, handler)


class TestAtEachStage:
    """One process, and what is at the output is replaced."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("source") / "in", dense_model())

    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
        def run(command: str, *words: str) -> tuple[int, str]:
            monkeypatch.setattr(sys, "argv", [f"amaxbridge {command}", *words])
            before = [signal.getsignal(number) for number in SIGNALS]
            with pytest.raises(SystemExit) as stop:
                cli.run(command, {"quantize": quantize, "export": export}[command])
            assert [signal.getsignal(number) for number in SIGNALS] == before
            return int(stop.value.code or 0), capsys.readouterr().err

        return run

    @pytest.mark.parametrize("stage", STAGES)
    def test_quantize(self, source: Path, tmp_path: Path, run: Run, stage: str) -> None:
        self.check(partial(run, "quantize", f"input={source}", "scheme=nvfp4a16"), tmp_path, stage, signal.SIGTERM)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
    @pytest.mark.parametrize("stage", ["planning", "writing", "moving"])
    def test_by_other_signals(self, source: Path, tmp_path: Path, run: Run, stage: str, number: signal.Signals) -> None:
        self.check(partial(run, "quantize", f"input={source}", "scheme=nvfp4a16"), tmp_path, stage, number)

    @pytest.mark.parametrize("stage", ["planning", "writing", "verifying", "syncing", "moving"])
    def test_export(self, live: LiveRanks, tmp_path: Path, run: Run, stage: str) -> None:
        words = (f"checkpoint={live.at(tp=2) / 'checkpoint'}", f"hf={live.hf}")
        self.check(partial(run, "export", *words), tmp_path, stage, signal.SIGTERM)

    def check(self, run: Run, tmp_path: Path, stage: str, number: signal.Signals) -> None:
        *where, says = STAGES[stage]
        out = tmp_path / "out"
        again = partial(run, f"output={out}", "io.overwrite=true")
        assert again()[0] == 0
        whole = files(out)
        shutil.rmtree(out)
        out.mkdir()
        for name, content in OLD.items():
            (out / name).write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            send_at(patch, *where, number=number)
            status, said = again()
        assert status == STATUS[number]
        messages = [line for line in said.splitlines() if not line.startswith(("INFO", "WARNING"))]
        assert messages[0] == f"error: {SAID[number]}"
        assert len(messages) == 1 + (stage != "planning") + (says == KEPT), said
        in_place = says == IN_PLACE
        assert says in said
        assert (f"nothing was written at {out}" in said) == (stage != "planning" and not in_place)
        assert files(out) == (whole if in_place else OLD)
        assert out.with_name("out.partial").exists() == (says == KEPT)
        assert again()[0] == 0
        assert files(out) == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


class TestHandlers:
    @pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
    def test_what_nohup_ignores_stays_ignored(self, number: signal.Signals) -> None:
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with stopped_by_signals():
                os.kill(os.getpid(), number)
                assert signal.getsignal(number) == signal.SIG_IGN
        finally:
            signal.signal(number, before)

    def test_torchrun_ends_ranks_by_sigterm_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        before = {number: signal.getsignal(number) for number in SIGNALS}
        with stopped_by_signals():
            after = {number: signal.getsignal(number) for number in SIGNALS}
        assert [number for number in SIGNALS if before[number] != after[number]] == [signal.SIGINT]

    def test_the_second_is_the_same_request(self) -> None:
        with stopped_by_signals():
            with pytest.raises(Stopped, match="by SIGTERM") as stop:
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.value.exit_status == 143

    def test_the_third_ends_the_process(self) -> None:
        program = (
            "import contextlib, signal\n"
            "from amaxbridge.interrupts import Stopped, stopped_by_signals\n"
            "with stopped_by_signals():\n"
            "    with contextlib.suppress(Stopped): signal.raise_signal(signal.SIGINT)\n"
            "    signal.raise_signal(signal.SIGINT)\n"
            "    signal.raise_signal(signal.SIGTERM)\n"
        )
        assert subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT).returncode == -signal.SIGTERM

    def test_a_block_that_must_not_be_interrupted_ends_first(self) -> None:
        steps = []
        with stopped_by_signals(), pytest.raises(Stopped):
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGHUP)
                os.kill(os.getpid(), signal.SIGINT)
                steps.append("done")
            steps.append("not reached")
        assert steps == ["done"]

    def test_its_own_error_comes_first(self) -> None:
        with stopped_by_signals():
            with pytest.raises(OSError, match="full"), uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                raise OSError("full")
            with uninterrupted():
                pass

    def test_other_threads_have_no_handlers(self) -> None:
        raised = []

        def work() -> None:
            with stopped_by_signals(), uninterrupted():
                raised.append(False)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert raised == [False]
