"""`.metadata` of a distributed checkpoint, read as data.

It is a pickle, and PyTorch would import whatever it names. Here the unpickler gets stand-ins: empty classes, made for
each load, that keep what a pickle gives them. Nothing that a pickle does to them outlives the load. PyTorch's own
dataclasses are then built from checked values.

`inert_pickle` reads pickles without an unpickler, which is safer still but ten times slower, and the metadata of a
large model is tens of megabytes. So the unpickler's own weakness needs care: a tuple of a million levels as the key of
a dict is hashed level by level on the C stack, and would end the process. The load has a stack for as many levels as
the file can have.

Source: torch.distributed.checkpoint.metadata and .filesystem; `MCoreMetadata` of
megatron.core.dist_checkpointing.strategies.torch.
"""

import io
import mmap
import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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

from amaxbridge.export.disk.input_files import read_input
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
_MOST_BYTES = 1 << 30  # of `.metadata`
_MOST_DIMS = 16
_OF_TUPLES = (b"\x85", b"\x86", b"\x87", b"t", b"R")  # opcodes that make one, and may be in strings, too
_STACK, _BYTES_OF_A_LEVEL = 8 << 20, 128
_MOST_LEVELS = 1 << 25
_STACK_SIZE = threading.Lock()  # the size is the process's, for threads that start


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
        found = _on_a_deep_stack(lambda: _Unpickler(io.BytesIO(data)).load(), data)
        return _metadata(found, file, _Budget(len(data)))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file} is not the metadata of a distributed checkpoint: {error}") from error


def _on_a_deep_stack[T](load: Callable[[], T], data: bytes) -> T:
    """Calls `load` on a stack that has room for the deepest tuple that a pickle can make."""
    levels = sum(data.count(opcode) for opcode in _OF_TUPLES)
    if levels > _MOST_LEVELS:
        raise ValueError(f"it may have {levels:,} tuples in one another")
    room = -(-(_STACK + levels * _BYTES_OF_A_LEVEL) // mmap.PAGESIZE) * mmap.PAGESIZE  # address space, not memory
    with _STACK_SIZE:
        before = threading.stack_size(room)
        try:
            pool = ThreadPoolExecutor(1)
            loading = pool.submit(load)  # starts the thread
        finally:
            threading.stack_size(before)
    with pool:
        return loading.result()


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


def _metadata(found: Any, file: Path, budget: _Budget) -> Metadata:
    fields = _fields(found, "Metadata", "MCoreMetadata")
    entries = {_text(name): _entry(entry, budget) for name, entry in _dict(fields["state_dict_metadata"]).items()}
    places = {_index(index): _place(place, file) for index, place in _dict(fields["storage_data"]).items()}
    absent = [name for name, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
    if any(MetadataIndex(name) not in places for name in absent):
        raise ValueError("a state lies in no file")
    return Metadata(state_dict_metadata=entries, storage_data=places)


def _entry(entry: Any, budget: _Budget) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    state, size = _state(fields["properties"], "TensorProperties"), _size(fields["size"])
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise TypeError("a tensor without a dtype")
    chunks = fields["chunks"]
    if not isinstance(chunks, list):
        raise TypeError(f"a {type(chunks).__name__} in the place of a list")
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
    if not isinstance(value, tuple) or len(value) > _MOST_DIMS:
        raise TypeError(f"a {type(value).__name__} in the place of a shape")
    return torch.Size(map(_count, value))
