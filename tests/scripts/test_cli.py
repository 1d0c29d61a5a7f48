"""The command line: exit statuses, one message per error, and the same bytes as the library."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from amaxbridge.export.output.config_and_index import CARD_FILE
from amaxbridge.export.output.provenance import RECORD_FILE
from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher, LiveRanks
from tests.support.paths import ENVIRONMENT, ROOT, WORKERS

EXPORT = ROOT / "scripts" / "export.py"


def export_equals_live(live: LiveRanks, output: Path) -> None:
    record = json.loads((output / "amaxbridge.json").read_text())
    assert record["command"] == "export"
    assert record["options"]["scheme"]["groups"] == [
        {"scheme": "nvfp4", "targets": ["Linear"], "group_size": None, "scales": None}
    ]
    assert record["options"]["output"] == str(output)
    assert {"amaxbridge", "torch", "megatron-core", "nvidia-modelopt"} <= record["versions"].keys()
    for path in (live.at(tp=2) / "nvfp4").iterdir():
        if path.name in (CARD_FILE, RECORD_FILE):  # these name the command
            continue
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (ROOT / "outputs").exists(), "Hydra left a folder"


def arguments(live: LiveRanks, output: Path) -> list[str]:
    checkpoint = live.at(tp=2) / "checkpoint"
    return [f"checkpoint={checkpoint}", f"hf={live.hf}", f"output={output}", "io.max_shard_gb=3e-5"]


def test_the_checkpoint_export_equals_the_live_export(live: LiveRanks, launch: Launcher, tmp_path: Path) -> None:
    """A Megatron distributed checkpoint with ModelOpt state, saved at TP=2, exported by one process."""
    printed = launch(EXPORT, *arguments(live, tmp_path / "out"))
    assert "modules quantized" in printed
    export_equals_live(live, tmp_path / "out")


def test_the_command_as_users_type_it(live: LiveRanks, tmp_path: Path) -> None:
    """Two processes under the real torchrun share the work."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "amaxbridge", "export"]
    subprocess.run([*torchrun, *arguments(live, tmp_path / "out")], env=ENVIRONMENT, cwd=tmp_path, check=True)
    export_equals_live(live, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at_start", [signal.SIG_DFL, signal.SIG_IGN], ids=["in a terminal", "after nohup … &"])
def test_ctrl_c_under_torchrun(live: LiveRanks, launch: Launcher, tmp_path: Path, at_start: signal.Handlers) -> None:
    """The terminal's SIGINT goes to torchrun and to both ranks, and torchrun passes on its own: each gets two.

    A shell starts what it runs in the background with SIGINT ignored, which children inherit.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, WORKERS / "slow_export.py", *arguments(live, tmp_path / "out")]
    inherited = signal.signal(signal.SIGINT, at_start)
    try:
        started = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=tmp_path, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, inherited)
    with started as run:
        assert run.stdout is not None
        for _ in range(4):  # two of each rank
            assert run.stdout.readline() == "a bundle\n"
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate()
    assert run.returncode == 1
    assert said.count("error: interrupted\n") == said.count(f"nothing was written at {tmp_path / 'out'}\n") == 1
    assert re.search(r"out\.partial keeps \d+ finished bundles: the same command continues from there", said), said
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    kept = [line for journal in (tmp_path / "out.partial").glob(".done-*") for line in journal.open()]
    assert len(kept) >= 2
    launch(EXPORT, *arguments(live, tmp_path / "out"), processes=2)
    export_equals_live(live, tmp_path / "out")


def test_dry_run_writes_nothing_but_the_plan(live: LiveRanks, launch: Launcher, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    printed = launch(EXPORT, *arguments(live, tmp_path / "out"), "dry_run=true", f"json={plan}")
    assert "plan for" in printed
    assert "model.layers.{0-1}.mlp.gate_proj.weight" in printed
    assert list(tmp_path.iterdir()) == [plan]
    rows = {row["name"]: row for row in json.loads(plan.read_text())["tensors"]}
    projection = rows["model.layers.{0-1}.mlp.gate_proj.weight"]
    assert (projection["count"], projection["scheme"], projection["shape"]) == (2, "nvfp4", [96, 64])
    exported = tensors_in(live.at(tp=2) / "nvfp4")
    assert sum(row["bytes_after"] for row in rows.values()) == sum(tensor.nbytes for tensor in exported.values())


def test_dry_run_without_a_checkpoint(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"hf={qwen3}", f"output={tmp_path / 'out'}", "dry_run=true", "parallel.tp=2", "parallel.pp=2")
    status, printed, _ = run(monkeypatch, capsys, *words)
    assert status == 0
    assert "4 ranks" in printed
    assert "The checkpoint must have" in printed
    assert list(tmp_path.iterdir()) == []


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Runs scripts/export.py in this process: its exit status, standard output and standard error."""
    from amaxbridge import cli
    from amaxbridge.scripts.export import export

    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run("export", export)
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


class TestWrongArguments:
    """Exit status 2 before any work, one message, no traceback, nothing written."""

    @pytest.fixture(autouse=True)
    def _tools(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._run = lambda *words: run(monkeypatch, capsys, *words)

    def refuse(self, options: dict[str, str], *more: str) -> str:
        status, _, message = self._run(*(f"{key}={value}" for key, value in options.items()), *more)
        assert status == 2, message
        assert "Traceback" not in message
        return message

    @pytest.fixture
    def good(self, qwen3: Path, tmp_path: Path) -> dict[str, str]:
        return {"checkpoint": str(tmp_path / "none"), "hf": str(qwen3), "output": str(tmp_path / "out")}

    def test_unknown_architecture(self, good: dict[str, str], qwen3: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(qwen3, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen9ForCausalLM"]}))
        message = self.refuse({**good, "hf": str(other)})
        assert "Qwen9ForCausalLM" in message
        assert "nearest: Qwen3ForCausalLM" in message

    def test_no_model_directory(self, good: dict[str, str], tmp_path: Path) -> None:
        assert "config.json" in self.refuse({**good, "hf": str(tmp_path)})

    def test_hf_that_contradicts_itself(self, good: dict[str, str], qwen3: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(qwen3, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": ["sliding"]}))
        assert "config.json is refused by transformers" in self.refuse({**good, "hf": str(other)})

    def test_the_model_itself_is_never_replaced(self, good: dict[str, str], qwen3: Path, tmp_path: Path) -> None:
        message = self.refuse({**good, "output": str(qwen3)}, "io.overwrite=true")
        assert "must not lie in one another" in message
        (tmp_path / "ckpt" / "iter_0000001").mkdir(parents=True)
        options = {**good, "checkpoint": str(tmp_path / "ckpt" / "iter_0000001"), "output": str(tmp_path / "ckpt")}
        assert "would replace" in self.refuse(options, "io.overwrite=true")
        assert (tmp_path / "ckpt" / "iter_0000001").is_dir()

    def test_home_is_found_where_the_shell_leaves_it(
        self, good: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert f"output {tmp_path / 'out'} exists" in self.refuse({**good, "output": "~/out"})

    def test_output_is_not_empty(self, good: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        assert "io.overwrite=true" in self.refuse(good)
        assert (tmp_path / "out" / "precious").read_text() == "mine"

    def test_option_left_out(self, good: dict[str, str]) -> None:
        del good["checkpoint"]
        assert "checkpoint= is required" in self.refuse(good)

    def test_no_hf_and_no_arguments_says_what_the_checkpoint_is(
        self, good: dict[str, str], live_moe: LiveRanks
    ) -> None:
        del good["hf"]
        checkpoint = live_moe.at(processes=2, tp=1, ep=2) / "checkpoint"
        message = self.refuse({**good, "checkpoint": str(checkpoint)})
        assert "hf= is required" in message
        assert "Qwen3MoeForCausalLM" in message

    def test_options_of_the_saved_arguments_beside_hf(self, good: dict[str, str]) -> None:
        assert "for a checkpoint without hf=" in self.refuse(good, "vocab_size=131")


def test_without_hf(
    live: LiveRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tensors, and a config.json, a card and a warning that say what is not from the source."""
    trained, out = live.at(tp=2), tmp_path / "out"
    words = (f"checkpoint={trained / 'checkpoint'}", f"output={out}", "io.max_shard_gb=3e-5")
    status, _, message = run(monkeypatch, capsys, *words)
    assert status == 0, message
    names = {file.name for file in (trained / "nvfp4").glob("*.safetensors")}
    assert names == {file.name for file in out.glob("*.safetensors")}
    assert all((out / name).read_bytes() == (trained / "nvfp4" / name).read_bytes() for name in names)
    written, source = (json.loads((directory / "config.json").read_text()) for directory in (out, trained / "nvfp4"))
    assert all(source[name] == value for name, value in written.items() if name not in ("initializer_range", "dtype"))
    assert "the output has no tokenizer" in (out / "README.md").read_text()
    assert json.loads((out / "amaxbridge.json").read_text())["notes"]


def test_a_checkpoint_that_is_none_fails_with_1(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"checkpoint={tmp_path}", f"hf={qwen3}", f"output={tmp_path / 'out'}")
    status, _, message = run(monkeypatch, capsys, *words)
    assert status == 1
    assert "is not a checkpoint of Megatron's training" in message
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = run(monkeypatch, capsys, "--help")
    assert status == 0
    assert "checkpoint" in printed
    assert "scheme: nvfp4" in printed
