"""Signals that ask a command to stop, at every stage of it; and their handlers."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amaxbridge import cli
from amaxbridge.export.output.finished_directory import BundleWriter
from amaxbridge.export.repair import repaired_directory
from amaxbridge.interrupts import Stopped, stopped_by_signals, uninterrupted
from amaxbridge.scripts.export import export
from amaxbridge.scripts.quantize import quantize
from amaxbridge.scripts.repair import repair
from tests.support.checkpoints import dense_model, write_checkpoint
from tests.support.checkpoints_to_verify import make
from tests.support.interrupting import (
    ENDING,
    PLANNING,
    SIGNALS,
    UNTOUCHED,
    WRITING,
    Moment,
    Run,
    as_in_a_terminal,
    check_interrupted,
)
from tests.support.launcher import Launcher, LiveRanks
from tests.support.paths import ENVIRONMENT, WORKERS
from tests.support.repair_breaks import share_nothing

COMMANDS = {"quantize": quantize, "export": export, "repair": repair}
STAGES = {**PLANNING, **WRITING, **ENDING}
REPAIRING = {
    "planning": Moment(repaired_directory, "plan_fingerprint", says=UNTOUCHED),
    "writing": Moment(BundleWriter, "write", before=False),  # of its only file
}


class TestAtEachStage:
    """One process, and what is at the output is replaced."""

    @pytest.fixture(autouse=True)
    def terminal(self) -> Iterator[None]:
        with as_in_a_terminal():
            yield

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("source") / "in", dense_model())

    @pytest.fixture(scope="class")
    def unequal(self, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A checkpoint that repair changes: the members of fused groups have global scales of their own."""
        made = make(qwen3, "nvfp4a16")
        share_nothing(made, {"k_proj": 4.0, "up_proj": 4.0})
        made.write(directory := tmp_path_factory.mktemp("unequal") / "in")
        return directory

    @pytest.fixture
    def command(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
        def command(name: str, *words: str) -> Run:
            def run(output: Path) -> tuple[int, str]:
                options = [*words, f"output={output}", "io.overwrite=true"]
                monkeypatch.setattr(sys, "argv", [f"amaxbridge {name}", *options])
                before = [signal.getsignal(number) for number in SIGNALS]
                with pytest.raises(SystemExit) as stop:
                    cli.run(name, COMMANDS[name])
                assert [signal.getsignal(number) for number in SIGNALS] == before
                return int(stop.value.code or 0), capsys.readouterr().err

            return run

        return command

    @pytest.mark.parametrize("stage", STAGES)
    def test_quantize(self, source: Path, tmp_path: Path, command: Callable[..., Run], stage: str) -> None:
        run = command("quantize", f"input={source}", "scheme=nvfp4a16")
        check_interrupted(run, tmp_path, STAGES[stage], signal.SIGTERM)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
    @pytest.mark.parametrize("stage", ["planning", "writing", "moving"])
    def test_by_other_signals(
        self, source: Path, tmp_path: Path, command: Callable[..., Run], stage: str, number: signal.Signals
    ) -> None:
        run = command("quantize", f"input={source}", "scheme=nvfp4a16")
        check_interrupted(run, tmp_path, STAGES[stage], number)

    @pytest.mark.parametrize("stage", ["planning", "writing", "verifying", "syncing", "moving"])
    def test_export(self, live: LiveRanks, tmp_path: Path, command: Callable[..., Run], stage: str) -> None:
        run = command("export", f"checkpoint={live.at(tp=2) / 'checkpoint'}", f"hf={live.hf}")
        check_interrupted(run, tmp_path, STAGES[stage], signal.SIGTERM)

    @pytest.mark.parametrize("stage", ["planning", "allocating", "writing", "verifying", "syncing", "moving"])
    def test_repair(self, unequal: Path, tmp_path: Path, command: Callable[..., Run], stage: str) -> None:
        moment = {**STAGES, **REPAIRING}[stage]
        check_interrupted(command("repair", f"input={unequal}"), tmp_path, moment, signal.SIGTERM)

    def test_import_and_live_export(self, launch: Launcher, qwen3: Path, tmp_path: Path) -> None:
        launch(WORKERS / "interrupted.py", qwen3, tmp_path)


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
