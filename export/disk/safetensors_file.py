"""One safetensors file, read row by row, from any number of threads.

The header is read and checked once; it says where every tensor lies. Rows are read in place: a part of the file is
mapped, used and released, so nothing is copied, and only the current part counts towards the process's memory, however
large the file is. For a GPU, rows are copied into pinned memory of the caller.

See `shard_layout` for the file format.
"""

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from amaxbridge.export.disk.row_chunks import Part
from amaxbridge.export.disk.shard_layout import DTYPE_NAMES
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.tensors import TensorSpec

PART_BYTES = 8 << 20
"""Bytes that are read at a time; they stay in the processor's cache while they are quantized."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit


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
        for first in range(0, total, length):
            part = self if length == total else self.rows(first, min(length, total - first))
            if into is None:
                yield Part(first, part.look())
                if not again:
                    self.file.forget(part.begin, part.spec.nbytes)
            else:
                fits = part.spec.nbytes <= limit  # a single row may be larger than `into`
                yield Part(first, part.read(into if fits else None))


@dataclass(slots=True)
class SafetensorsFile:
    """An open safetensors file whose header is read and checked.

    Raises:
        CheckpointError: the file is truncated or is not a safetensors file.
    """

    path: Path
    tensors: dict[str, StoredTensor] = field(init=False)
    metadata: dict[str, str] = field(init=False)
    _file: int = field(init=False)
    _map: mmap.mmap = field(init=False)

    def __post_init__(self) -> None:
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            self.tensors = self._read_header()
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.close()
            raise CheckpointError(f"{self.path} cannot be read: {error}; copy the file again") from error

    def read(self, begin: int, memory: Tensor) -> None:
        """Fills `memory`, uint8, from the file."""
        data = memoryview(memory.numpy())
        while data:
            count = os.preadv(self._file, [data], begin)
            if not count:
                raise CheckpointError(f"{self.path} ends at byte {begin:,}: it became shorter while it was read")
            data, begin = data[count:], begin + count

    def look(self, begin: int, nbytes: int) -> Tensor:
        """A part of the file as uint8, without a copy. The kernel is asked to read ahead."""
        start = begin - begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, start, begin + nbytes - start)
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=begin, count=nbytes)

    def forget(self, begin: int, nbytes: int) -> None:
        """Drops these pages from the process's memory; they stay in the page cache."""
        start = begin + -begin % mmap.PAGESIZE
        end = (begin + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._file).st_size
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            if os.pread(self._file, len(_LFS_POINTER), 0) == _LFS_POINTER:
                raise ValueError("a pointer of git-lfs, not the weights: `git lfs pull` fetches them")
            raise ValueError(f"{size:,} bytes, with a header of {length:,}: truncated, or not safetensors")
        entries = json.loads(os.pread(self._file, length, 8))
        self.metadata = entries.pop("__metadata__", None) or {}
        begin, tensors = 8 + length, {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} has the dtype {entry['dtype']}, which is not known here")
            spec = TensorSpec(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            if 8 + length + start != begin or end - start != spec.nbytes:
                raise ValueError(f"{name}: {spec} does not lie at bytes {start:,} to {end:,}")
            tensors[name] = StoredTensor(self, begin, spec)
            begin += spec.nbytes
        if begin != size:
            raise ValueError(f"{size:,} bytes, and its header says {begin:,}: truncated, or written to twice")
        return tensors
