"""One safetensors file, read row by row, from any number of threads.

The header is read and checked once; it says where every tensor lies. Rows are read in place: a part of the file is
mapped, used and released, so nothing is copied, and only the current part counts towards the process's memory, however
large the file is. For a GPU, rows are copied into pinned memory of the caller.

See `shard_layout` for the file format.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from amaxbridge.export.disk.input_files import identity, open_input
from amaxbridge.export.disk.io_errors import changed_meanwhile, explaining_reads
from amaxbridge.export.disk.mapped_file import MappedFile
from amaxbridge.export.disk.open_files import OpenFiles
from amaxbridge.export.disk.row_chunks import Part
from amaxbridge.export.disk.shard_layout import DTYPE_NAMES
from amaxbridge.export.disk.strict_json import parse_json_object
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.tensors import TensorSpec

PART_BYTES = 8 << 20
"""Bytes that are read at a time; they stay in the processor's cache while they are quantized."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
_LONGEST_NAME = 1000  # characters
_MOST_DIMS = 16
_LARGEST = 1 << 62  # elements or bytes: no file is larger
_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, or consecutive rows of one.

    Args:
        file: the file that holds it.
        begin: offset of its data from the beginning of the file, in bytes.
        spec: shape and dtype.
    """

    file: "SafetensorsFile"
    begin: int
    spec: TensorSpec

    def read(self, into: Tensor | None = None) -> Tensor:
        """Reads the tensor into CPU memory: into `into`, uint8 of at least its size, if given."""
        memory = torch.empty(self.spec.nbytes, dtype=torch.uint8) if into is None else into[: self.spec.nbytes]
        self.file.read(self.begin, memory)
        return memory.view(self.spec.dtype).reshape(self.spec.shape)

    def look(self) -> Tensor:
        """The tensor as a view of the mapped file: read it, never write it, and release it with `forget`."""
        if self.begin % self.spec.dtype.itemsize or not self.spec.nbytes:
            return self.read()
        return self.file.look(self.begin, self.spec.nbytes).view(self.spec.dtype).reshape(self.spec.shape)

    def rows(self, first: int, count: int) -> "StoredTensor":
        """Consecutive rows along the first dim."""
        row = TensorSpec(self.spec.shape[1:], self.spec.dtype)
        return StoredTensor(self.file, self.begin + first * row.nbytes, TensorSpec((count, *row.shape), row.dtype))

    def row(self, index: int) -> "StoredTensor":
        """One row, without the first dim."""
        row = TensorSpec(self.spec.shape[1:], self.spec.dtype)
        return StoredTensor(self.file, self.begin + index * row.nbytes, row)

    def parts(self, step: int = 1, into: Tensor | None = None, *, again: bool = False) -> Iterator[Part]:
        """As `Rows`: views of the file of a few megabytes, or parts that fit `into`, read into it."""
        limit = PART_BYTES if into is None else len(into)
        total = self.spec.shape[0] if self.spec.shape else 1
        length = total
        if self.spec.nbytes > limit and self.spec.shape:
            length = max(limit // (self.spec.nbytes // total) // step, 1) * step
        for first in range(0, total, max(length, 1)):
            part = self if length == total else self.rows(first, min(length, total - first))
            if into is None:
                yield Part(first, part.look())
                self.file.check()
                if not again:
                    self.file.forget(part.begin, part.spec.nbytes)
            else:
                fits = part.spec.nbytes <= limit  # a single row may be larger than `into`
                yield Part(first, part.read(into if fits else None))


@dataclass(slots=True)
class SafetensorsFile:
    """A safetensors file whose header is read and checked.

    Args:
        files: where files that are being read are kept open; those of one checkpoint share it.
        inside: the directory that the file must lie in, through every link; None for a file that the user named.

    Raises:
        CheckpointError: the file is truncated or is not a safetensors file.
    """

    path: Path
    files: OpenFiles = field(default_factory=OpenFiles, repr=False)
    inside: Path | None = field(default=None, repr=False)
    tensors: dict[str, StoredTensor] = field(init=False)
    metadata: dict[str, str] = field(init=False)
    _map: MappedFile = field(init=False)
    _identity: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        file = self._open()
        try:
            with explaining_reads(self.path):
                state = os.fstat(file)
                self._identity = identity(state)
                self.tensors = self._read_header(file, state)
                self._map = MappedFile(file, state.st_size, self.path)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}; copy the file again") from error
        finally:
            os.close(file)

    def read(self, begin: int, memory: Tensor) -> None:
        """Fills `memory`, uint8, from the file."""
        file = self.files.get(str(self.path), self._open)
        data = memoryview(memory.numpy())
        with explaining_reads(self.path):
            while data:
                count = os.preadv(file.number, [data], begin)
                if not count:
                    raise CheckpointError(f"{self.path} ends at byte {begin:,}: it became shorter while it was read")
                data, begin = data[count:], begin + count

    def look(self, begin: int, nbytes: int) -> Tensor:
        """As `MappedFile.look`."""
        return self._map.look(begin, nbytes)

    def forget(self, begin: int, nbytes: int) -> None:
        """As `MappedFile.forget`."""
        self._map.forget(begin, nbytes)

    def check(self) -> None:
        """As `MappedFile.check`."""
        self._map.check()

    def close(self) -> None:
        self.files.drop(str(self.path))

    def _open(self) -> int:
        file = open_input(self.path, self.inside)
        if self._identity and identity(os.fstat(file)) != self._identity:
            os.close(file)
            raise changed_meanwhile(self.path)
        return file

    def check_unchanged(self) -> None:
        """Raises CheckpointError if another file has its path by now, or if it was written to since it was opened."""
        os.close(self._open())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_header(self, file: int, state: os.stat_result) -> dict[str, StoredTensor]:
        size = state.st_size
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            if os.pread(file, len(_LFS_POINTER), 0) == _LFS_POINTER:
                raise ValueError("a pointer of git-lfs, not the weights: `git lfs pull` fetches them")
            raise ValueError(f"{size:,} bytes, with a header of {length:,}: truncated, or not safetensors")
        header = read_header(os.pread(file, length, 8))
        self.metadata = header.metadata
        if header.end != size:
            raise ValueError(f"{size:,} bytes, and its header says {header.end:,}: truncated, or written to twice")
        return {name: StoredTensor(self, header.begins[name], spec) for name, spec in header.specs.items()}


class Header(NamedTuple):
    """What a header says: of each tensor its spec and where it begins in the file, and where the file ends."""

    metadata: dict[str, str]
    specs: dict[str, TensorSpec]
    begins: dict[str, int]
    end: int


def read_header(text: bytes) -> Header:
    """Reads a header, without the length before it.

    Raises:
        ValueError: it is none, or its tensors do not lie one after the other.
    """
    entries = parse_json_object(text)
    header = Header(_texts(entries.pop("__metadata__", None) or {}), {}, {}, 0)
    first = begin = 8 + len(text)
    specs = {name: _entry(name, entry) for name, entry in entries.items()}
    for name, (spec, start, end) in sorted(specs.items(), key=lambda item: item[1][1:]):
        if first + start != begin or end - start != spec.nbytes:
            raise ValueError(f"{name}: {spec} does not lie at bytes {start:,} to {end:,}")
        header.specs[name], header.begins[name] = spec, begin
        begin += spec.nbytes
    return header._replace(end=begin)


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ must map strings to strings")
    return metadata


def _entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Spec, begin and end of a tensor, from its entry in the header.

    Raises:
        ValueError: the entry is not one; or a name, a number of dims or a size that no tensor has.
    """
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise ValueError(f"{name[:80]!r} is no name of a tensor: {len(name):,} characters, or not printable")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise ValueError(f"{name}: an entry has {', '.join(sorted(_ENTRY))}, this one {_shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has the dtype {_shown(dtype)}, which is not known here")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMS or math.prod(side or 1 for side in shape) > _LARGEST:
        raise ValueError(f"{name}: the shape {_shown(shape)} is none that a tensor can have")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: data_offsets are two numbers, not {_shown(offsets)}")
    return TensorSpec(tuple(shape), _DTYPES[dtype]), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(side) is int and 0 <= side <= _LARGEST for side in value)


def _shown(value: Any) -> str:
    """A value in a message, of bounded length."""
    return repr(value)[:80]
