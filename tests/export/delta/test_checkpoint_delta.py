"""A delta of two directories makes the second of the first, byte for byte, and nothing of anything else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.export.delta.applied_directory import apply_delta
from amaxbridge.export.delta.checkpoint_delta import DELTA_FILE, write_delta
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import CheckpointError, OutputExistsError, UsageError
from tests.support.checkpoints import dense_model, write_checkpoint

CONFIG = {"architectures": ["Qwen3ForCausalLM"]}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training's checkpoints, quantized: after a step, after a small one more, and another training's."""
    root, made = tmp_path_factory.mktemp("delta"), {}
    generator = torch.Generator().manual_seed(11)
    tensors = dense_model(layers=1)
    other = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}
    nudged = {
        name: tensor + (1e-5 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    for name, each in (("base", tensors), ("new", nudged), ("other", other)):
        plain = write_checkpoint(root / f"{name}_plain", each, config=CONFIG)
        model_free_ptq(plain, root / name, "fp8_dynamic", device="cpu")
        made[name] = root / name
    (made["new"] / "notes.txt").write_text("after step 2")
    (made["base"] / "old.txt").write_text("gone after step 2")
    return made


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_delta_applied_is_the_new_directory(steps: dict[str, Path], tmp_path: Path) -> None:
    report = write_delta(steps["base"], steps["new"], tmp_path / "step.safetensors")
    assert report.in_places > 0
    assert report.nbytes == (tmp_path / "step.safetensors").stat().st_size < report.whole_bytes / 2
    apply_delta(steps["base"], tmp_path / "step.safetensors", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(steps["new"])


def test_there_and_back_and_to_another_training(steps: dict[str, Path], tmp_path: Path) -> None:
    for number, (base, new) in enumerate((("new", "base"), ("base", "other"), ("base", "base"))):
        report = write_delta(steps[base], steps[new], tmp_path / str(number))
        assert (tmp_path / str(number) / DELTA_FILE).is_file()
        assert (report.in_places + report.whole == 0) == (base == new)
        apply_delta(steps[base], tmp_path / str(number), tmp_path / f"out_{number}")
        assert contents(tmp_path / f"out_{number}") == contents(steps[new])


def test_a_base_in_other_files_will_do(steps: dict[str, Path], tmp_path: Path) -> None:
    """The tensors count, not the files that they lie in."""
    write_delta(steps["base"], steps["new"], tmp_path / "delta")
    shutil.copytree(steps["base"], tmp_path / "base")
    (single,) = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(single)
    single.unlink()
    halves = [dict(list(tensors.items())[each::2]) for each in (0, 1)]
    for number, half in enumerate(halves):
        save_file(half, tmp_path / "base" / f"model-{number}.safetensors")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(steps["new"])


def test_another_base_is_refused_by_name(steps: dict[str, Path], tmp_path: Path) -> None:
    write_delta(steps["base"], steps["new"], tmp_path / "delta")
    with pytest.raises(CheckpointError, match="q_proj") as refused:
        apply_delta(steps["other"], tmp_path / "delta", tmp_path / "out")
    assert "is not what" in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("change", ["a dtype", "a shape", "a tensor less", "a tensor more"])
def test_tensors_that_change_kind_come_whole(steps: dict[str, Path], tmp_path: Path, change: str) -> None:
    shutil.copytree(steps["base"], tmp_path / "new")
    (file,) = (tmp_path / "new").glob("*.safetensors")
    tensors = load_file(file)
    norm = "model.norm.weight"
    tensors |= {
        "a dtype": {norm: tensors[norm].half()},
        "a shape": {norm: torch.ones(7, dtype=torch.bfloat16)},
        "a tensor less": {},
        "a tensor more": {"model.extra.weight": torch.arange(5.0)},
    }[change]
    if change == "a tensor less":
        del tensors[norm]
    save_file(tensors, file)
    report = write_delta(steps["base"], tmp_path / "new", tmp_path / "delta")
    assert report.whole == (0 if change == "a tensor less" else 1)

    apply_delta(steps["base"], tmp_path / "delta", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def _flip(at: float) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return flip


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _no_delta(file: Path) -> None:
    save_file({"a": torch.ones(3)}, file)


@pytest.mark.parametrize(
    "damage",
    [*(_flip(at) for at in (0.3, 0.5, 0.75, 0.9, 0.99, 1.0)), _cut, _no_delta],
    ids=["30 %", "50 %", "75 %", "90 %", "99 %", "the last byte", "cut", "no delta"],
)
def test_a_damaged_delta_is_refused(steps: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_delta(steps["base"], steps["new"], tmp_path / "delta")
    damage(tmp_path / "delta" / DELTA_FILE)
    with pytest.raises(CheckpointError):
        apply_delta(steps["base"], tmp_path / "delta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", ".hidden.safetensors"])
def test_names_that_lead_elsewhere_are_refused(steps: dict[str, Path], tmp_path: Path, name: str) -> None:
    write_delta(steps["base"], steps["new"], tmp_path / "delta")
    file = tmp_path / "delta" / DELTA_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    said = json.loads(header["__metadata__"]["amaxbridge_delta"])
    said["tensor_files"] = [name]
    header["__metadata__"]["amaxbridge_delta"] = json.dumps(said)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match="names the file"):
        apply_delta(steps["base"], tmp_path / "delta", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"delta"}


def test_what_is_there_is_kept(steps: dict[str, Path], tmp_path: Path) -> None:
    write_delta(steps["base"], steps["new"], tmp_path / "delta")
    with pytest.raises(OutputExistsError, match="overwrite"):
        write_delta(steps["base"], steps["new"], tmp_path / "delta")
    write_delta(steps["base"], steps["new"], tmp_path / "delta", overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExistsError, match="overwrite"):
        apply_delta(steps["base"], tmp_path / "delta", tmp_path / "out")
    with pytest.raises(UsageError):
        apply_delta(steps["base"], tmp_path / "delta", steps["base"] / "inside")
    with pytest.raises(UsageError, match="is not there"):
        write_delta(tmp_path / "nothing", steps["new"], tmp_path / "delta2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
