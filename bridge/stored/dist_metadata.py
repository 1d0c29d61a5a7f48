"""`.metadata` of a distributed checkpoint, read as data.

It is a pickle, and PyTorch would import whatever it names. Here the unpickler gets stand-ins: empty classes, made for
each load, that keep what a pickle gives them. Nothing that a pickle does to them outlives the load. PyTorch's own
dataclasses are then built from checked values.

`inert_pickle` reads pickles without an unpickler, which is safer still but ten times slower, and the metadata of a
large model is tens of megabytes.

Source: torch.distributed.checkpoint.metadata and .filesystem; `MCoreMetadata` of
megatron.core.dist_checkpointing.strategies.torch.
"""

import pickle
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

from amaxbridge.export.disk.input_paths import checked_name
from amaxbridge.mappings.errors import CheckpointError

_OF_TORCH = "torch.distributed.checkpoint"
_PLAIN: Mapping[tuple[str, str], Any] = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}
_KNOWN = {
    *((f"{_OF_TORCH}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *((f"{_OF_TORCH}.planner", name) for name in (  # the plans of saving ranks, which Megatron keeps in .metadata
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )),
    (f"{_OF_TORCH}.filesystem", "_StorageInfo"),
    (f"{_OF_TORCH}._extension", "ZStandard"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_MOST = 1 << 62  # bytes or elements: no file is larger


def read_metadata(file: Path) -> Metadata:
    """Reads `.metadata`.

    Raises:
        CheckpointError: the file is damaged, names classes or functions that do not describe a checkpoint, or names
            files outside its directory.
    """
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream).load()
        return _metadata(found, file)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file} is not the metadata of a distributed checkpoint: {error}") from error


class _StandIn:
    """An object that a pickle would have constructed: its arguments and its state."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "_StandIn":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Gives stand-ins for known names and refuses all other names."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._made: dict[tuple[str, str], Any] = dict(_PLAIN)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _KNOWN:
            return self._made.setdefault((module, name), type(name, (_StandIn,), {}))
        if (module, name) in self._made:
            return self._made[module, name]
        named = f"{module}.{name}"
        raise pickle.UnpicklingError(f"it names {named if named.isprintable() else ascii(named)}")


def _metadata(found: Any, file: Path) -> Metadata:
    fields = _fields(found, "Metadata", "MCoreMetadata")
    entries = {_text(name): _entry(entry) for name, entry in _dict(fields["state_dict_metadata"]).items()}
    places = {_index(index): _place(place, file) for index, place in _dict(fields["storage_data"]).items()}
    absent = [name for name, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
    if any(MetadataIndex(name) not in places for name in absent):
        raise ValueError("a state lies in no file")
    return Metadata(state_dict_metadata=entries, storage_data=places)


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    state, size = _state(fields["properties"], "TensorProperties"), _size(fields["size"])
    if not isinstance(state, tuple) or not isinstance(state[0], torch.dtype):
        raise TypeError("a tensor without a dtype")
    return TensorStorageMetadata(
        TensorProperties(dtype=state[0]), size, [_chunk(each, size) for each in fields["chunks"]]
    )


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
        raise ValueError(f"its tensors are compressed ({fields['transform_descriptors']!r}): save them uncompressed")
    return _StorageInfo(checked_name(fields["relative_path"], file), _count(fields["offset"]), _count(fields["length"]))


def _fields(value: Any, *classes: str) -> Mapping[str, Any]:
    return _dict(_state(value, *classes))


def _state(value: Any, *classes: str) -> Any:
    if not isinstance(value, _StandIn) or type(value).__name__ not in classes:
        raise TypeError(f"a {type(value).__name__} in the place of a {classes[0]}")
    return value.state


def _dict(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} in the place of a dict")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} in the place of a name")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} in the place of a size")
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple):
        raise TypeError(f"a {type(value).__name__} in the place of a shape")
    return torch.Size(map(_count, value))
