"""Files of torch.save, read as data: the tensors that PyTorch reads, and refusals of what it would not have written."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.bridge.stored.inert_pickle import Made, Named, NotReadable
from amaxbridge.bridge.stored.torch_archive import SavedTensor, open_archive
from amaxbridge.mappings.errors import CheckpointError

STORAGE = ("storage", Named("torch", "FloatStorage"), "0", "cpu", 6)


def saved(offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1), storage: Any = STORAGE) -> Made:
    """A tensor as a pickle describes it."""
    made = Made(Named("", "persistent_load"), storage)
    return Made(Named("torch._utils", "_rebuild_tensor_v2"), (made, offset, size, stride, False, {}))


def tensors() -> dict[str, Tensor]:
    base = torch.randn(4, 6)
    views = {"transposed": base.t(), "part": base[1:3, 2:5], "steps": base[:, ::2], "one": base[2, 3], "none": base[:0]}
    dtypes = (torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.float8_e4m3fn)
    return {**views, "base": base, **{str(dtype): torch.arange(5).to(dtype) for dtype in dtypes}}


def test_what_torch_reads(tmp_path: Path) -> None:
    state = {**tensors(), "parameter": torch.nn.Parameter(torch.randn(3, 2))}
    torch.save(state, tmp_path / "file.pt")
    value, archive = open_archive(tmp_path / "file.pt", tmp_path)
    assert value.keys() == state.keys()
    for name, expected in torch.load(tmp_path / "file.pt").items():
        found = SavedTensor.of(value[name])
        assert found is not None
        read = archive.read(found)
        assert (read.shape, read.dtype) == (expected.shape, expected.dtype), name
        assert torch.equal(read.float(), expected.detach().float()), name


BAD = {
    "outside": saved(offset=1),
    "negative": saved(offset=-1),
    "backwards": saved(offset=5, stride=(-3, -1)),
    "too large for any number": saved(size=(1 << 40, 1 << 40), stride=(0, 0)),
    "expanded": saved(size=(1 << 40, 3), stride=(0, 1)),
    "a shape of names": saved(size=("a",)),
    "more strides": saved(stride=(3, 1, 1)),
    "no numbers": saved(offset=None),
    "an unknown storage": saved(storage=("storage", Named("torch", "Strange"), "0", "cpu", 6)),
    "no storage": saved(storage="storage"),
    "a path": saved(storage=("storage", Named("torch", "FloatStorage"), "../0", "cpu", 6)),
    "no end of elements": saved(storage=(*STORAGE[:4], 1 << 62), size=(1 << 62,), stride=(1,)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_tensors_that_are_none(kind: str) -> None:
    with pytest.raises(NotReadable):
        SavedTensor.of(BAD[kind])


@pytest.mark.parametrize("value", [None, 1, [saved()], Made(Named("os", "system"), ("a",))])
def test_other_values(value: Any) -> None:
    assert SavedTensor.of(value) is None


def rewritten(source: Path, target: Path, *, skip: str = "", compress: str = "", cut: str = "") -> None:
    """A file of torch.save with one member left out, compressed or cut."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for each in old.infolist():
            content = old.read(each)
            if skip and each.filename.endswith(skip):
                continue
            packed = bool(compress) and each.filename.endswith(compress)
            kept = content[:5] if cut and each.filename.endswith(cut) else content
            new.writestr(each.filename, kept, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)


@pytest.mark.parametrize("change", [{"skip": "data/0"}, {"compress": "data/0"}, {"cut": "data/0"}])
def test_storages_that_are_not_there(tmp_path: Path, change: dict[str, str]) -> None:
    torch.save({"a": torch.ones(4, 6)}, tmp_path / "good.pt")
    rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", **change)
    value, archive = open_archive(tmp_path / "bad.pt", tmp_path)
    tensor = SavedTensor.of(value["a"])
    assert tensor is not None
    with pytest.raises(CheckpointError, match="storage 0 is missing, compressed or too short"):
        archive.read(tensor)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "file.pt")
    value, archive = open_archive(tmp_path / "file.pt", tmp_path)
    os.truncate(tmp_path / "file.pt", 1500)
    tensor = SavedTensor.of(value["a"])
    assert tensor is not None
    with pytest.raises(CheckpointError, match="became shorter"):
        archive.read(tensor)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", bytes(1000)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as a file of torch\.save"):
        open_archive(tmp_path / "file.pt", tmp_path)


def test_bytes_in_another_order(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(3)}, stream)
    content = stream.getvalue().replace(b"little", b"big\0\0\0")
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        open_archive(tmp_path / "file.pt", tmp_path)
