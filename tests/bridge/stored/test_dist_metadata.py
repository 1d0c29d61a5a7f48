"""`.metadata` is read as data: a good one as torch reads it, any other ends in one error, and nothing lasts."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from amaxbridge.bridge.stored.dist_metadata import read_metadata
from amaxbridge.mappings.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"weight": torch.zeros(4, 6, dtype=torch.bfloat16), "amax": torch.ones(()), "state": b"bytes"}
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    return tmp_path / ".metadata"


def test_it_is_what_torch_reads(saved: Path) -> None:
    ours, torchs = read_metadata(saved), FileSystemReader(saved.parent).read_metadata()
    assert ours.storage_data == torchs.storage_data
    assert ours.state_dict_metadata.keys() == torchs.state_dict_metadata.keys() == {"weight", "amax", "state"}
    for name, theirs in torchs.state_dict_metadata.items():
        entry = ours.state_dict_metadata[name]
        assert type(entry) is type(theirs)
        if isinstance(theirs, TensorStorageMetadata):
            assert isinstance(entry, TensorStorageMetadata)
            assert (entry.size, entry.chunks) == (theirs.size, theirs.chunks)
            assert entry.properties.dtype == theirs.properties.dtype


def write(file: Path, change: Callable[[Metadata], None]) -> None:
    metadata = FileSystemReader(file.parent).read_metadata()
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def place(name: Any, offset: Any = 0, length: Any = 1) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for index in metadata.storage_data:
            metadata.storage_data[index] = _StorageInfo(name, offset, length)

    return change


def tensor(size: Any, offsets: Any, sizes: Any, dtype: Any = torch.float32) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        chunk = ChunkStorageMetadata(offsets, sizes)
        properties = TensorProperties(dtype=dtype)
        metadata.state_dict_metadata["weight"] = TensorStorageMetadata(properties, size, [chunk])

    return change


def lost_state(metadata: Metadata) -> None:
    metadata.state_dict_metadata["other"] = BytesStorageMetadata()


def compressed(metadata: Metadata) -> None:
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = _StorageInfo(info.relative_path, info.offset, info.length, ["zstd"])


def other_kinds(metadata: Metadata) -> None:
    metadata.storage_data = [MetadataIndex("weight")]


S = torch.Size
CHANGES = {
    "a file above": place("../victim.distcp"),
    "an absolute file": place("/etc/passwd"),
    "a hidden file": place(".metadata"),
    "a file that is a number": place(3),
    "a negative offset": place("__0_0.distcp", offset=-1),
    "a length that is a bool": place("__0_0.distcp", length=True),
    "a length beyond any file": place("__0_0.distcp", length=1 << 80),
    "a chunk outside of its tensor": tensor(S([4]), S([3]), S([2])),
    "a chunk of other dims": tensor(S([4, 4]), S([0]), S([2])),
    "a negative shape": tensor((-4,), (0,), (4,)),
    "a shape of strings": tensor(("4",), (0,), (4,)),
    "no dtype": tensor(S([4]), S([0]), S([4]), dtype="float32"),
    "a state in no file": lost_state,
    "compressed tensors": compressed,
    "places in a list": other_kinds,
}


@pytest.mark.parametrize("what", CHANGES)
def test_values_that_describe_no_checkpoint(saved: Path, what: str) -> None:
    write(saved, CHANGES[what])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_metadata(saved)


def call(function: Any) -> bytes:
    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return function, ("true",)

    return pickle.dumps(Attack())


_METADATA = b"ctorch.distributed.checkpoint.metadata\n"
_METADATA_OF_A_STATE = (
    _METADATA + b"Metadata\n)\x81}(X\x13\x00\x00\x00state_dict_metadata}X\x0c\x00\x00\x00storage_data}"
    + _METADATA + b"MetadataIndex\n)\x81}(X\x03\x00\x00\x00fqnX\x01\x00\x00\x00aX\x05\x00\x00\x00indexSIZEub"
    b"Nsub."
)  # fmt: skip
PICKLES = {
    "a call of os.system": call(os.system),
    "a call of eval": call(eval),
    "attributes of a class": _METADATA + b"Metadata\n(N}X\x04\x00\x00\x00sizeI1\nsetb.",
    "attributes of tuple": b"ctorch\nSize\n(N}X\x04\x00\x00\x00sizeI1\nsetb.",
    "a name with dots": b"\x80\x04\x8c\x05torch\x8c\x0cserial.Size2\x93.",
    "a function of an allowed module": b"ctorch.distributed.checkpoint.metadata\ndataclass\n.",
    "a persistent id": b"Pname\n.",
    "an extension code": b"\x82\x01.",
    "a number": pickle.dumps(3),
    "nothing": b"",
    "text": b"<html>not found</html>",
    "a pickle cut short": pickle.dumps({"a": [1, 2, 3]})[:-4],
    "a tuple of a million levels": b"\x80\x04" + b")" + b"\x85" * 1_000_000 + b".",
    "the same as a key": b"\x80\x04}" + b")" + b"\x85" * 1_000_000 + b"Ns.",
    "the same in a set": b"\x80\x04\x8f(" + b")" + b"\x85" * 1_000_000 + b"\x90.",
    "a tuple that doubles, as a key": b"\x80\x04})" + b"2\x86" * 200 + b"Ns.",
    "the same in a set, as text": b"\x80\x04\x8f()" + b"2\x86" * 200 + b"\x90\x8c\x01aR.",
    "the same in the place of a size": _METADATA_OF_A_STATE.replace(b"SIZE", b")" + b"2\x86" * 200),
    "lists of a million levels": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "a claim of 8 GB": b"\x80\x04\x8e\x00\x00\x00\x00\x02\x00\x00\x00abc.",
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_of_another_kind(tmp_path: Path, what: str) -> None:
    file = tmp_path / ".metadata"
    file.write_bytes(PICKLES[what])
    before = dict(vars(Metadata))
    with pytest.raises(CheckpointError, match="is not the metadata of a distributed checkpoint"):
        read_metadata(file)
    assert dict(vars(Metadata)) == before


def test_state_given_to_a_known_class_does_not_last(saved: Path) -> None:
    """BUILD with slot state would set attributes of the class itself, were it torch's own."""
    slots = b"(N}X\x0d\x00\x00\x00relative_pathX\x04\x00\x00\x00evilstb"
    attack = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n" + slots + b"0" + saved.read_bytes()[2:]
    (saved.parent / "attack").write_bytes(attack)
    with pytest.raises(CheckpointError):
        read_metadata(saved.parent / "attack")
    assert not hasattr(_StorageInfo, "relative_path")
    assert {info.relative_path for info in read_metadata(saved).storage_data.values()} == {"__0_0.distcp"}


def test_one_list_of_chunks_named_again_and_again(saved: Path) -> None:
    """Time and memory are bounded by the file: 2,000 tensors of 2,000 chunks would be four million of a small file."""
    chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([1])) for _ in range(2000)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([1]), chunks)
    state = {f"w{index}": entry for index in range(2000)}
    saved.write_bytes(pickle.dumps(Metadata(state_dict_metadata=state, storage_data={})))
    assert saved.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match="more chunks than its bytes can name"):
        read_metadata(saved)
