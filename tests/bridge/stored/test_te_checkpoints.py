"""Checkpoints of real Transformer Engine models, exported on a CPU: the tensors of the live export, byte for byte."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint

FIXTURES = Path(__file__).parents[2] / "fixtures" / "te"
CASES = sorted(path.name.removesuffix(".tar.xz") for path in FIXTURES.glob("*.tar.xz"))


def described(tensor: Tensor) -> str:
    """A tensor in the form of `expected.json`: dtype, shape and the beginning of its SHA-256."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    shape = "×".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {hashlib.sha256(data).hexdigest()[:16]}"


def tensors_of(directory: Path) -> dict[str, str]:
    with SafetensorsCheckpoint(directory) as checkpoint:
        return {name: described(checkpoint.read(name)) for name in checkpoint.tensors}


def test_every_kind_of_checkpoint_has_a_fixture() -> None:
    assert len(CASES) >= 19


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_gives_what_the_live_model_gave(case: str, tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / f"{case}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    directory = tmp_path / case
    expected = json.loads((directory / "expected.json").read_text())
    bridge = AutoBridge.from_hf_pretrained(directory)
    bridge.convert_checkpoint(directory / "checkpoint", tmp_path / "out", scheme=expected["scheme"])
    found = tensors_of(tmp_path / "out")
    assert len(found) > 5
    assert found == expected["tensors"]
