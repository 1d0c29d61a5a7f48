"""Progress, and the message when Ctrl-C ends the work."""

import io
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from amaxbridge import cli
from amaxbridge.bridge import AutoBridge
from amaxbridge.export.progress import NoProgress
from amaxbridge.scripts.progress_bar import EachMinute, Meter, progress
from tests.support.comparing import same_files
from tests.support.launcher import LiveRanks


class Clock:
    """A clock whose seconds pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_meter_counts_and_what_was_kept_is_no_speed() -> None:
    clock = Clock()
    meter = Meter(lambda meter: None, clock)
    meter.begin(tensors=40, nbytes=80 * 10**9, kept=20 * 10**9)
    assert str(meter) == "20.0 of 80.0 GB, 0 of 40 tensors, 0.00 GB/s, ? left"
    clock.now = 10.0
    meter.advance(tensors=10, nbytes=5 * 10**9)
    assert str(meter) == "25.0 of 80.0 GB, 10 of 40 tensors, 0.50 GB/s, 0:01:50 left"


def test_one_line_a_minute_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    meter = Meter(EachMinute("exporting", clock), clock)
    with caplog.at_level(logging.INFO, "amaxbridge"):
        meter.begin(tensors=600, nbytes=600 * 10**9)
        for second in range(1, 181):
            clock.now = float(second)
            meter.advance(tensors=1, nbytes=10**9)
    assert caplog.messages == [
        "exporting: 60.0 of 600.0 GB, 60 of 600 tensors, 1.00 GB/s, 0:09:00 left",
        "exporting: 120.0 of 600.0 GB, 120 of 600 tensors, 1.00 GB/s, 0:08:00 left",
        "exporting: 180.0 of 600.0 GB, 180 of 600 tensors, 1.00 GB/s, 0:07:00 left",
    ]


def test_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for terminal in (True, False):
        screen = io.StringIO()
        with progress("exporting", Console(file=screen, force_terminal=terminal, width=120)) as shown:
            shown.begin(tensors=2, nbytes=2 * 10**9)
            shown.advance(tensors=1, nbytes=10**9)
        assert ("exporting" in screen.getvalue() and "1.0 of 2.0 GB, 1 of 2 tensors" in screen.getvalue()) == terminal


def test_of_several_ranks_it_says_that_it_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    screen = io.StringIO()
    with progress("exporting", Console(file=screen, force_terminal=True, width=200)) as shown:
        shown.begin(tensors=2, nbytes=10)
    assert "exporting, one of 4 equal shares" in screen.getvalue()


def test_on_one_terminal_only_the_first_rank_shows_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's ranks share a terminal; ranks that are started one by one have an output each."""
    monkeypatch.setenv("RANK", "1")
    with progress("exporting") as shown:
        assert isinstance(shown, Meter)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with progress("exporting") as shown:
        assert isinstance(shown, NoProgress)


class InterruptingProgress(NoProgress):
    """Sends this process Ctrl-C after some bundles."""

    def __init__(self, bundles: int) -> None:
        self.left = bundles
        self.kept = self.nbytes = 0

    def begin(self, *, tensors: int, nbytes: int, kept: int = 0) -> None:
        self.kept, self.nbytes = kept, nbytes

    def advance(self, *, tensors: int, nbytes: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_says_what_the_next_run_goes_on_from(
    live: LiveRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = live.at(tp=2) / "checkpoint", tmp_path / "out"

    def export(progress: InterruptingProgress) -> None:
        bridge = AutoBridge.from_hf_pretrained(live.hf)
        bridge.convert_checkpoint(checkpoint, output, max_shard_bytes=30_000, progress=progress)

    monkeypatch.setattr(sys, "argv", ["export.py", f"checkpoint={checkpoint}", f"hf={live.hf}", f"output={output}"])
    with pytest.raises(SystemExit) as stop:
        cli.run("export", lambda options: export(InterruptingProgress(bundles=3)))
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert f"error: interrupted\nnothing was written at {output}\n" in said
    assert f"{output}.partial keeps 3 finished bundles: the same command continues from there" in said

    second = InterruptingProgress(bundles=-1)
    export(second)
    assert 0 < second.kept < second.nbytes
    same_files(output, live.at(tp=2) / "nvfp4")
