"""Words of a command line: text as it stands, flags, sweeps, and commands typed again."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig

from amaxbridge import cli
from amaxbridge.configs.schema import COMMANDS
from amaxbridge.configs.words import for_hydra, typed_again
from amaxbridge.mappings.errors import CheckpointError
from tests.support.paths import ROOT

TEXTS = [
    "/models/run=3",
    "/data/a,b",
    "my models/x (1)",
    "a[1]{2}",
    "über#&!?*%@",
    "it's",
    'say "hi"',
    "back\\slash\\",
    "12e4",
    "0123",
    "true",
    "owner/model@5e10",
]


def run_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, command: Any = None
) -> tuple[int, list[dict[str, Any]], str]:
    """Runs a command line of `quantize` in this process: its exit status, the options of each job, standard error."""
    jobs: list[dict[str, Any]] = []

    def noted(options: Any) -> None:
        jobs.append({**dataclasses.asdict(options), "typed": cli.command_line("quantize")})
        if command is not None:
            command(options)

    monkeypatch.setattr(sys, "argv", ["quantize.py", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run("quantize", noted)
    return int(stop.value.code or 0), jobs, capsys.readouterr().err


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, (job,), said = run_all(monkeypatch, capsys, f"input={text}", "output=b")
    assert (status, said) == (0, "")
    assert job["input"] == text
    status, (again,), _ = run_all(
        monkeypatch, capsys, *typed_again(for_hydra([f"input={text}"], COMMANDS["quantize"])), "output=b"
    )
    assert again["input"] == text


def test_what_was_quoted_for_hydra_still_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ('input="/models/run=3"', "output=${input}-q", "quant_state=null")
    _, (job,), _ = run_all(monkeypatch, capsys, *words)
    assert (job["input"], job["output"], job["quant_state"]) == ("/models/run=3", "/models/run=3-q", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nvfp4"], "nvfp4 is not name=value. Did you mean scheme=nvfp4?"),
        (["input=/my", "models"], "A value with spaces is quoted: 'input=/my models'"),
        (["scripts"], "Did you mean input=scripts?"),
        (["input="], "input= is empty"),
        (["--input", "x"], "Unknown flag --input. Options have no dashes: input=…"),
        (["--dry-run=true"], "Options have no dashes: dry_run=true"),
        (["--experimental-rerun", "x.pickle"], "Unknown flag --experimental-rerun"),
        (["=x"], "=x is not name=value"),
        (["+foo=1"], "Unknown option foo="),
        (["++io.overwrit=true"], "Did you mean io.overwrite=?"),
        (["ignore=lm_head"], "ignore= is a list"),
        (["scheme=fp8,nvfp4"], "--multirun runs a job for each"),
    ],
)
def test_words_that_are_none(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    status, jobs, message = run_all(monkeypatch, capsys, *words)
    assert (status, jobs) == (2, [])
    assert said in message
    assert len(message.splitlines()) == 1


def test_a_known_option_may_be_added(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, (job,), _ = run_all(monkeypatch, capsys, "input=a", "output=b", "+scheme=fp8", "++ignore=[x]")
    assert job["scheme"]["groups"][0]["scheme"] == "fp8"
    assert job["ignore"] == ["x"]


class TestSweeps:
    """`--multirun`."""

    WORDS = ("--multirun", "input=a b", "output=out-${hydra:runtime.choices.scheme}", "scheme=fp8,nvfp4,w4a16")

    def test_every_job_runs_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        status, jobs, said = run_all(monkeypatch, capsys, *self.WORDS)
        assert status == 0
        assert [job["output"] for job in jobs] == ["out-fp8", "out-nvfp4", "out-w4a16"]
        assert [job["input"] for job in jobs] == ["a b"] * 3
        assert "scheme=nvfp4" in jobs[1]["typed"] and "fp8" not in jobs[1]["typed"]
        assert said.count("job ") == 3
        assert list(tmp_path.iterdir()) == []

    def test_the_worst_status_counts(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def second_fails(options: Any) -> None:
            if options.output == "out-nvfp4":
                raise CheckpointError("a bad one")

        status, jobs, said = run_all(monkeypatch, capsys, *self.WORDS, command=second_fails)
        assert (status, len(jobs)) == (1, 3)
        assert said.endswith("failed: 1 of 3 jobs (2)\n")

    def test_ctrl_c_ends_the_sweep(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        from amaxbridge.interrupts import Stopped

        def stopped(options: Any) -> None:
            raise Stopped(2)

        status, jobs, _ = run_all(monkeypatch, capsys, *self.WORDS, command=stopped)
        assert (status, len(jobs)) == (130, 1)

    def test_a_job_that_cannot_be_keeps_all_from_starting(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, jobs, said = run_all(monkeypatch, capsys, "-m", "input=a", "output=b", "scheme=fp8,fp9")
        assert (status, jobs) == (2, [])
        assert "Unknown scheme=fp9" in said

    def test_a_place_for_hydra_s_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run_all(monkeypatch, capsys, *self.WORDS, "hydra.sweep.dir=records")
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["records/multirun.yaml"]


@pytest.mark.parametrize("how", ["--config-dir", "searchpath"])
def test_a_recipe_with_the_name_of_a_built_in_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra would take the built-in in silence."""
    (tmp_path / "scheme").mkdir()
    (tmp_path / "scheme" / "fp8.yaml").write_text("groups: [{scheme: w4a16}]\n")
    where = [how, str(tmp_path)] if how == "--config-dir" else [f"hydra.searchpath=[file://{tmp_path}]"]
    status, jobs, said = run_all(monkeypatch, capsys, "input=a", "output=b", "scheme=fp8", *where)
    assert (status, jobs) == (2, [])
    assert "fp8.yaml has the name of a built-in choice" in said


def test_hydra_verbose_shows_everything(tmp_path: Path) -> None:
    code = (
        "import logging\n"
        "from amaxbridge import cli\n"
        "def command(options):\n"
        "    for name in ('filelock', 'amaxbridge', 'other'):\n"
        "        logging.getLogger(name).debug('heard')\n"
        "cli.run('quantize', command)\n"
    )
    heard = {}
    for verbose in ("false", "true", "[filelock]"):
        words = ["input=a", "output=b", f"hydra.verbose={verbose}"]
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        heard[verbose] = [name for name in ("filelock", "amaxbridge", "other") if f"{name}: heard" in done.stderr]
    assert heard == {"false": [], "true": ["filelock", "amaxbridge", "other"], "[filelock]": ["filelock"]}


def test_bash_completes(tmp_path: Path) -> None:
    """The script of `amaxbridge completion` in a real bash."""
    (tmp_path / "my model").mkdir()
    lines = {
        "amaxbridge qu": ["quantize"],
        "amaxbridge quantize inp": ["input="],
        "amaxbridge export io.": ["io.overwrite=", "io.hash_source=", "io.max_shard_gb="],
        "amaxbridge quantize input=x scheme=nv": ["nvfp4", "nvfp4a16"],
        "amaxbridge quantize dry_run=": ["true", "false"],
        "amaxbridge verify input=my": ["my model"],
    }
    script = subprocess.run(
        [sys.executable, "-m", "amaxbridge", "completion"], check=True, capture_output=True, text=True
    )
    asked = 'COMP_LINE="$LINE"; COMP_POINT=${#LINE}; _amaxbridge 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"'
    for line, wanted in lines.items():
        done = subprocess.run(
            ["bash", "-c", f"{script.stdout}\n{asked}"],
            check=True, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "LINE": line},
        )  # fmt: skip
        assert done.stdout.splitlines() == wanted, line
    assert len(lines) == 6


def test_a_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from amaxbridge import __version__

    monkeypatch.setattr(sys, "argv", ["quantize.py", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.run("quantize", print)
    assert (stop.value.code, capsys.readouterr().out.strip()) == (0, __version__)
    assert not HydraConfig.initialized()
