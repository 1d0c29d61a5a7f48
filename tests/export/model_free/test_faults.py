"""What can be wrong with a checkpoint, the arguments or the disk: one clear error, and nothing lost or half-written."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.output_place import MARK
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import (
    AmaxbridgeError,
    CheckpointError,
    MappingError,
    OutputExistsError,
    UsageError,
    WriteError,
)
from tests.support.checkpoints import cuts_inside_groups, dense_model, state_of, tensors_of, write_checkpoint
from tests.support.paths import ENVIRONMENT, ROOT, WORKERS

FIRST, SECOND = "model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"
KILLS = int(os.environ.get("KILLS", 5))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = dense_model()
    return write_checkpoint(tmp_path / "in", tensors, cuts=cuts_inside_groups(tensors))


def refuse(source: Path, kind: type[AmaxbridgeError], message: str, **options: object) -> None:
    """The run ends in this error, before anything is written and with the source as it was."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(kind, match=message):
        model_free_ptq(source, source.parent / "out", options.pop("scheme", "nvfp4a16"), **options)  # type: ignore[arg-type]
    assert sorted(source.parent.iterdir()) == before


def change_index(source: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def set_weight(source: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})


class TestFiles:
    def test_a_tensor_missing_from_the_index(self, source: Path) -> None:
        change_index(source, lambda weight_map: weight_map.pop("lm_head.weight"))
        refuse(source, CheckpointError, rf"lm_head\.weight: in {FIRST}, not in the index")

    def test_an_index_entry_missing_from_the_files(self, source: Path) -> None:
        change_index(source, lambda weight_map: weight_map.update({"gone.weight": FIRST}))
        refuse(source, CheckpointError, rf"gone\.weight: in the index, not in {FIRST}")

    def test_an_index_that_names_another_file(self, source: Path) -> None:
        change_index(source, lambda weight_map: weight_map.update({"lm_head.weight": SECOND}))
        refuse(source, CheckpointError, rf"lm_head\.weight: in {FIRST}, and in {SECOND} as the index says")

    def test_a_truncated_file(self, source: Path) -> None:
        os.truncate(source / SECOND, (source / SECOND).stat().st_size - 10)
        refuse(source, CheckpointError, rf"{SECOND} cannot be read: .*truncated")

    @pytest.mark.parametrize("size", [0, 4, 100])
    def test_a_truncated_header(self, source: Path, size: int) -> None:
        os.truncate(source / SECOND, size)
        refuse(source, CheckpointError, rf"{SECOND} cannot be read")

    def test_a_file_that_is_no_safetensors(self, source: Path) -> None:
        (source / SECOND).write_bytes(b"\xff" * 1000)
        refuse(source, CheckpointError, rf"{SECOND} cannot be read")

    def test_a_missing_shard(self, source: Path) -> None:
        (source / SECOND).unlink()
        refuse(source, CheckpointError, rf"names files that are not there:\n  {SECOND}")

    def test_an_extra_shard(self, source: Path) -> None:
        save_file({"stray.weight": torch.ones(4, 4)}, source / "stray.safetensors")
        refuse(source, CheckpointError, r"stray\.weight: in stray\.safetensors, not in the index")

    def test_no_index_with_several_shards(self, source: Path) -> None:
        (source / "model.safetensors.index.json").unlink()
        refuse(source, CheckpointError, "5 safetensors files and no model.safetensors.index.json")

    def test_an_index_that_is_no_json(self, source: Path) -> None:
        (source / "model.safetensors.index.json").write_text("{")
        refuse(source, CheckpointError, "is not valid JSON")

    def test_no_weights(self, source: Path) -> None:
        for file in source.glob("model*"):
            file.unlink()
        refuse(source, CheckpointError, "download the weights")

    def test_files_of_pytorch_only(self, source: Path) -> None:
        for file in source.glob("model*"):
            file.unlink()
        (source / "pytorch_model.bin").write_bytes(b"")
        refuse(source, CheckpointError, "save them again")

    def test_a_pointer_of_git_lfs(self, source: Path) -> None:
        (source / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2894848\n")
        refuse(source, CheckpointError, "git lfs pull")

    def test_weights_that_lie_the_other_way(self, source: Path) -> None:
        (source / "config.json").write_text('{"model_type": "gpt2"}')
        refuse(source, UsageError, r"gpt2 stores its weights as \[in, out\]")

    def test_no_config(self, source: Path) -> None:
        (source / "config.json").unlink()
        refuse(source, UsageError, "no config.json")


class TestTensors:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4", "fp8_block", "w4a16", "w8a8"])
    def test_not_finite(self, source: Path, value: float, scheme: str) -> None:
        name = "model.layers.1.mlp.up_proj"
        set_weight(source, f"{name}.weight", lambda weight: weight[3, 5:6].fill_(value))
        refuse(source, MappingError, f"{name}: the weight holds NaN or Inf", scheme=scheme)

    def test_columns_not_divisible(self, source: Path, tmp_path: Path) -> None:
        tensors = {"a.down_proj.weight": torch.ones(8, 24), "b.down_proj.weight": torch.ones(8, 40)}
        other = write_checkpoint(tmp_path / "other", tensors)
        refuse(
            other,
            MappingError,
            r"2 weights .*\n  a\.down_proj\.weight: .*\[8, 24\]\n  b\.down_proj\.weight: ",
            architecture="guess",
        )

    def test_a_partner_that_is_missing_is_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A module that other layers have is missing in one: it is named, and the rest of the group is quantized."""
        tensors = dense_model()
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        report = model_free_ptq(write_checkpoint(tmp_path / "in", tensors), tmp_path / "out", "nvfp4a16")
        assert "model.layers.1.self_attn.v_proj: without k_proj" in caplog.text
        assert len(report.quantized) == 13
        found = tensors_of(tmp_path / "out")
        scales = {found[f"model.layers.1.self_attn.{name}_proj.weight_global_scale"].item() for name in "qv"}
        assert len(scales) == 1

    def test_a_group_ignored_in_part(self, source: Path) -> None:
        refuse(source, MappingError, "fused groups must be quantized as one", ignore=["re:.*k_proj$"])

    def test_packed_experts_that_do_not_divide(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "in", {"m.experts.gate_up_proj": torch.ones(2, 5, 32)})
        refuse(
            source,
            MappingError,
            r"m\.experts\.gate_up_proj: \[2, 5, 32\] does not divide into gate and up",
            architecture="guess",
        )


class TestArguments:
    def test_an_unknown_scheme(self, source: Path) -> None:
        refuse(source, UsageError, "unknown scheme 'nvfp5'; known: nvfp4, nvfp4a16, ", scheme="nvfp5")

    def test_an_ignore_that_matches_nothing(self, source: Path) -> None:
        refuse(source, UsageError, r"1 entries of ignore match no module:\n  lm_haed", ignore=["lm_haed", "lm_head"])

    def test_a_scheme_that_needs_calibrated_inputs(self, source: Path) -> None:
        refuse(source, UsageError, "needs calibrated inputs, for 14 modules", scheme="nvfp4")

    def test_auto_without_a_state(self, source: Path) -> None:
        refuse(source, UsageError, "reads the formats from quantizers", scheme="auto")

    @pytest.mark.parametrize("inside", [".", "out", ".."])
    def test_output_and_input_in_one_another(self, source: Path, inside: str) -> None:
        with pytest.raises(UsageError, match="must not lie in one another"):
            model_free_ptq(source, source / inside, "nvfp4a16", overwrite=True)
        assert (source / FIRST).exists()

    def test_output_is_not_empty(self, source: Path) -> None:
        output = source.parent / "out"
        output.mkdir()
        (output / "precious").write_text("mine")
        refuse(source, OutputExistsError, "overwrite=True")
        model_free_ptq(source, output, "nvfp4a16", overwrite=True)
        assert not (output / "precious").exists()

    def test_an_output_that_cannot_be_made(self, source: Path) -> None:
        (source.parent / "file").touch()
        with pytest.raises(UsageError, match=r"cannot be made: .*file: File exists; choose another output"):
            model_free_ptq(source, source.parent / "file" / "out", "nvfp4a16")

    @pytest.mark.parametrize(("device", "message"), [("gpu", "unknown device=gpu"), ("cuda:99", "torch finds")])
    def test_a_device_that_there_is_not(self, source: Path, device: str, message: str) -> None:
        refuse(source, UsageError, message, device=device)

    @pytest.mark.parametrize("name", ["models/qwen4", "hf/config.json"])
    def test_neither_a_directory_nor_a_model_of_the_hub(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The real Hub client runs offline."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "config.json").touch()
        with pytest.raises(UsageError, match=r"is not there, and the Hub does not give a model models/qwen4|is a file"):
            model_free_ptq(name, tmp_path / "out", "nvfp4a16")

    def test_no_such_directory(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="none is not there: give a directory"):
            model_free_ptq(tmp_path / "none", tmp_path / "out", "nvfp4a16")

    def test_another_run_is_writing(self, source: Path) -> None:
        code = (
            "import fcntl, os, signal, sys\n"
            "os.makedirs(sys.argv[1]); open(sys.argv[1] + '/' + sys.argv[2], 'w').close()\n"
            "lock = os.open(sys.argv[1] + '/.done-0-of-1', os.O_RDWR | os.O_CREAT)\n"
            "fcntl.flock(lock, fcntl.LOCK_EX); print('locked', flush=True); signal.pause()\n"
        )
        partial = source.parent / "out.partial"
        with subprocess.Popen([sys.executable, "-c", code, partial, MARK], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            refuse(source, OutputExistsError, "another run is writing")
            other.kill()


class TestState:
    def test_an_amax_for_a_module_that_does_not_exist(self, source: Path) -> None:
        state = state_of(dense_model(3), "nvfp4")
        refuse(
            source, UsageError, r"7 of 21 modules that the checkpoint does not have", quant_state=state, scheme="nvfp4"
        )

    @pytest.mark.parametrize("value", [0.0, float("nan")])
    def test_an_amax_that_makes_no_scale(self, source: Path, value: float) -> None:
        state = state_of(dense_model(), "nvfp4")
        name = "model.layers.0.mlp.up_proj.input_quantizer._amax"
        bad = QuantState({**state.amax, name: torch.tensor(value)}, state.formats)
        refuse(source, AmaxbridgeError, re.escape(name), quant_state=bad, scheme="nvfp4")


class TestDisk:
    def test_full_before_the_work(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "posix_fallocate", _no_space)
        refuse(source, WriteError, "No space left on device; free space")

    def test_too_little_room(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        refuse(source, WriteError, "bytes are to be written, the disk has room for 1,000")

    def test_full_while_writing(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is written is kept, and the next run goes on from it."""
        write, calls = os.pwrite, iter(range(10**6))
        monkeypatch.setattr(os, "pwrite", lambda *args: _no_space() if next(calls) > 20 else write(*args))
        with pytest.raises(WriteError, match="No space left on device"):
            model_free_ptq(source, source.parent / "out", "nvfp4a16")
        monkeypatch.undo()
        assert not (source.parent / "out").exists()
        assert model_free_ptq(source, source.parent / "out", "nvfp4a16").resumed > 3


@pytest.mark.parametrize("how", ["absent", "exchanged", "two_moves", "inside"])
def test_killed_at_any_moment(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL at any moment, and before any operation on a file: the output is the old one or the new one, and the run
    after it ends with the bytes of one that was never disturbed.

    `make test-faults` does it more than a thousand times.
    """
    tensors = dense_model()
    source = write_checkpoint(tmp_path / "in", tensors, cuts=cuts_inside_groups(tensors))
    (tmp_path / "work").mkdir()
    command = [sys.executable, WORKERS / "killed.py", source, tmp_path / "work" / "out", str(KILLS), "7", how]
    printed = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    with capsys.disabled():
        print(how, printed)
    result = json.loads(printed)
    assert result["right"] == result["kills"] == sum(result["left"].values()) == KILLS
    assert result["operations"] > 100
    assert "torn" not in result["left"]
    assert result["left"]["old, work kept"] > KILLS / 4
    model_free_ptq(source, tmp_path / "again", "nvfp4a16")
    written = {path.name: path.read_bytes() for path in (tmp_path / "work" / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == written


def _no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
