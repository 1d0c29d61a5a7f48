"""`.metadata` of a distributed checkpoint, read as data.

It is a pickle, and PyTorch would import whatever it names. Here `inert_pickle` reads it, and PyTorch's own dataclasses
are built from checked values.

Source: torch.distributed.checkpoint.metadata and .filesystem; `MCoreMetadata` of
megatron.core.dist_checkpointing.strategies.torch.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from amaxbridge.bridge.stored.inert_pickle import Made, Named, read_long_pickle
from amaxbridge.export.disk.input_files import read_input
from amaxbridge.export.disk.input_paths import checked_name
from amaxbridge.mappings.errors import CheckpointError

_OF_TORCH = "torch.distributed.checkpoint"
_KNOWN = frozenset({
    *(Named(f"{_OF_TORCH}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *(Named(f"{_OF_TORCH}.planner", name) for name in (  # the plans of saving ranks, which Megatron keeps in .metadata
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )),
    Named(f"{_OF_TORCH}.filesystem", "_StorageInfo"),
    Named(f"{_OF_TORCH}._extension", "ZStandard"),
    Named("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    Named("torch.serialization", "_get_layout"),
    Named("pathlib", "PosixPath"),
})  # fmt: skip
_MOST = 1 << 62  # bytes or elements: no file is larger
_MOST_BYTES = 1 << 30  # of `.metadata`
_MOST_DIMS = 16


def read_metadata(file: Path) -> Metadata:
    """Reads `.metadata`.

    Raises:
        CheckpointError: the file is damaged, names classes or functions that do not describe a checkpoint, or names
            files outside its directory.
    """
    data = read_input(file, file.parent, most=_MOST_BYTES)
    if data is None:
        raise CheckpointError(f"{file} is not there: copy the checkpoint again")
    try:
        return _metadata(read_long_pickle(data, _KNOWN), file, _Budget(len(data)))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{file} is not the metadata of a distributed checkpoint: {error}") from error


class _Budget:
    """Counts chunks: a file has no more of them than bytes, but may name one list of them again and again.

    Args:
        most: bytes of the file.
    """

    def __init__(self, most: int) -> None:
        self._left = most

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError("more chunks than its bytes can name")


def _metadata(found: Any, file: Path, budget: _Budget) -> Metadata:
    fields = _fields(found, "Metadata", "MCoreMetadata")
    entries = {_text(name): _entry(entry, budget) for name, entry in _dict(fields["state_dict_metadata"]).items()}
    places = {_index(index): _place(place, file) for index, place in _dict(fields["storage_data"]).items()}
    absent = [name for name, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
    if any(MetadataIndex(name) not in places for name in absent):
        raise ValueError("a state lies in no file")
    return Metadata(state_dict_metadata=entries, storage_data=places)


def _entry(entry: Any, budget: _Budget) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(entry, Made) and _class_of(entry) == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    state, size = _state(fields["properties"], "TensorProperties"), _size(fields["size"])
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise TypeError("a tensor without a dtype")
    chunks = fields["chunks"]
    if not isinstance(chunks, list):
        raise TypeError(f"{_what(chunks)} in the place of a list")
    budget.spend(len(chunks))
    return TensorStorageMetadata(TensorProperties(dtype=state[0]), size, [_chunk(each, size) for each in chunks])


def _chunk(chunk: Any, whole: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(chunk, "ChunkStorageMetadata")
    offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
    inside = (begin + size <= end for begin, size, end in zip(offsets, sizes, whole, strict=True))
    if not all(inside):
        raise ValueError(f"a chunk at {list(offsets)} of {list(sizes)} in a tensor of {list(whole)}")
    return ChunkStorageMetadata(offsets, sizes)


def _index(index: Any) -> MetadataIndex:
    fields = _fields(index, "MetadataIndex")
    offset, number = fields.get("offset"), fields.get("index")
    if number is not None:
        _count(number)
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _size(offset), number)


def _place(place: Any, file: Path) -> _StorageInfo:
    fields = _fields(place, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise ValueError("its tensors are compressed: save them uncompressed")
    return _StorageInfo(checked_name(fields["relative_path"], file), _count(fields["offset"]), _count(fields["length"]))


def _fields(value: Any, *classes: str) -> Mapping[str, Any]:
    return _dict(_state(value, *classes))


def _state(value: Any, *classes: str) -> Any:
    if not isinstance(value, Made) or _class_of(value) not in classes:
        raise TypeError(f"{_what(value)} in the place of a {classes[0]}")
    return value.state


def _class_of(made: Made) -> str:
    """The name of its class, which is one of `_KNOWN`."""
    return made.by.name if isinstance(made.by, Named) else ""


def _what(value: Any) -> str:
    """What a value is. Not the value, which may be of any size."""
    return f"a {_class_of(value) or 'thing' if isinstance(value, Made) else type(value).__name__}"


def _dict(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{_what(value)} in the place of a dict")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_what(value)} in the place of a name")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(
            f"{_what(value)} in the place of a size" if type(value) is not int else "a size that no file has"
        )
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or len(value) > _MOST_DIMS:
        raise TypeError(f"{_what(value)} in the place of a shape")
    size = torch.Size(map(_count, value))
    if math.prod(dim or 1 for dim in size) >= _MOST:  # PyTorch's own product would overflow
        raise ValueError("a shape that no file can hold")
    return size
