"""Megatron's distributed checkpoints (`torch_dist`) on the disk: global tensors, read region by region, in any process.

A checkpoint is a directory of `.distcp` files and one `.metadata`, which gives the file of each chunk of each global
tensor. PyTorch's own reader reads it; no process group, Megatron or model is needed.

Checkpoints are untrusted, so no pickle in them may run code: PyTorch loads tensors with `weights_only`, states are
returned as bytes (`inert_pickle` reads them), and `dist_metadata` reads `.metadata`.
"""

import io
import os
import pickle
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from amaxbridge.bridge.stored.checkpoint_kinds import METADATA
from amaxbridge.bridge.stored.dist_metadata import read_metadata
from amaxbridge.bridge.stored.inert_pickle import NotReadable, check_tensor_pickle, read_archive
from amaxbridge.bridge.stored.saved_iteration import checkpoint_iteration
from amaxbridge.bridge.stored.stored_source import Join, Region
from amaxbridge.export.disk.input_files import open_input, read_input
from amaxbridge.export.disk.input_paths import refuse_leaving
from amaxbridge.export.disk.io_errors import explaining_reads
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.tensors import TensorSpec

_TWICE_OR_MISSING = "{}: {} has chunks missing or twice in {}"
_COMMON = "common_state/"
_COMMON_FILE = "common.pt"  # before Megatron-Core 0.17


class DistCheckpoint:
    """A distributed checkpoint, open for reading.

    Args:
        path: the training's save directory, or one `iter_NNNNNNN` in it.

    Raises:
        CheckpointError: not a distributed checkpoint, or files are missing or too short; all are named.
    """

    def __init__(self, path: Path) -> None:
        self.directory = checkpoint_iteration(path)
        self._metadata = read_metadata(self.directory / METADATA)
        self._check_files()
        self._checked = set[str]()
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every global tensor by its name in the checkpoint."""
        return {
            key: TensorSpec(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @cached_property
    def states(self) -> list[str]:
        """The names of all other entries: pickled state, `…/shard_0_1`."""
        entries = self._metadata.state_dict_metadata
        return [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]

    def spec(self, region: Region) -> TensorSpec:
        """Shape and dtype of a region."""
        whole = self.tensors[region.key]
        return TensorSpec(whole.shape[len(region.index) :], whole.dtype)

    def cuts(self, region: Region) -> list[int]:
        """The first row of each chunk of a region, along its first dim: where the saving ranks cut it."""
        return sorted({chunk.offsets[len(region.index)] for chunk in self._entry(region).chunks})

    def read(self, regions: Sequence[Region]) -> list[Tensor]:
        """The tensors of some regions, on the CPU.

        Raises:
            CheckpointError: the files do not hold what the metadata says.
        """
        targets: dict[str, Tensor] = {}
        items: list[ReadItem] = []
        for number, region in enumerate(regions):
            spec, ones = self.spec(region), (1,) * len(region.index)
            entry = self._entry(region)  # checks that the files hold so much
            targets[str(number)] = torch.empty((*ones, *spec.shape), dtype=spec.dtype)
            wanted = ChunkStorageMetadata(
                torch.Size((*region.index, *(0 for _ in spec.shape))), torch.Size((*ones, *spec.shape))
            )
            found = create_read_items_for_chunk_list(region.key, entry, [wanted])
            if sum(item.lengths.numel() for item in found) != targets[str(number)].numel():
                raise CheckpointError(_TWICE_OR_MISSING.format(self.directory, region.key, METADATA))
            items += [_renamed(item, str(number)) for item in found]
        try:
            self._check_archives(items)
            self._reader.read_data(LoadPlan(items), _Into(targets))
        except Exception as error:  # a damaged file makes torch raise anything
            keys = sorted({region.key for region in regions})
            # torch would advise weights_only=False, which may run code
            damaged = isinstance(error, pickle.UnpicklingError)
            why = "the bytes of a tensor are damaged, copy the files again" if damaged else error
            raise CheckpointError(f"{self.directory} cannot be read: {why}; while reading{listing(keys)}") from error
        return [
            targets[str(number)].reshape(targets[str(number)].shape[len(region.index) :])
            for number, region in enumerate(regions)
        ]

    def state(self, key: str) -> bytes:
        """The bytes of one pickled state; `inert_pickle` reads them without running code."""
        place = self._metadata.storage_data[MetadataIndex(key)]
        file = self.directory / place.relative_path
        with explaining_reads(file), open(open_input(file, self.directory), "rb") as opened:
            opened.seek(place.offset)
            content = opened.read(place.length)
        if len(content) < place.length:
            raise CheckpointError(f"{file} became shorter while it was read: copy the file again")
        return content

    def arguments(self) -> Any:
        """The arguments of training; see `StoredSource`."""
        keys = [key for key in self.states if key.startswith(_COMMON)]
        data = self.state(keys[0]) if keys else read_input(self.directory / _COMMON_FILE, self.directory)
        common = {} if data is None else self.read_state(data)
        return common.get("args") if isinstance(common, Mapping) else None

    def read_state(self, data: bytes) -> Any:
        """What was saved beside the model in a state of its own.

        Raises:
            CheckpointError: the bytes are damaged.
        """
        try:
            value = read_archive(data)
        except NotReadable as error:
            raise CheckpointError(f"{self.directory}: the saved arguments cannot be read: {error}") from error
        return value[0] if isinstance(value, list) and value else value

    def whole(self, join: Join) -> "DistCheckpoint":
        """Its tensors are whole."""
        del join
        return self

    def _entry(self, region: Region) -> TensorStorageMetadata:
        """The metadata of a tensor, reduced to the chunks that hold the region's index."""
        entry = self._metadata.state_dict_metadata[region.key]
        assert isinstance(entry, TensorStorageMetadata)
        self._check_chunks(region.key, entry)
        if not region.index:
            return entry
        depth = len(region.index)
        if (region.key, depth) not in self._chunks:  # sorted once: there may be tens of thousands
            chunks = self._chunks[region.key, depth] = defaultdict(list)
            for chunk in entry.chunks:
                if not chunk.sizes.numel():  # it would stand for any number of indices
                    continue
                spans = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for index in product(*(range(begin, begin + size) for begin, size in spans)):
                    chunks[index].append(chunk)
        return replace(entry, chunks=self._chunks[region.key, depth][region.index])

    def _check_chunks(self, key: str, entry: TensorStorageMetadata) -> None:
        """Refuses sizes that the files cannot hold, before memory or time is spent on them."""
        if key in self._checked:
            return
        itemsize, total = entry.properties.dtype.itemsize, 0
        for chunk in entry.chunks:
            place = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            count = chunk.sizes.numel()
            if place is None or place.length < count * itemsize:
                raise CheckpointError(
                    f"{self.directory}: {METADATA} says that {key} has a chunk {list(chunk.sizes)} of "
                    f"{entry.properties.dtype}, for which it names no file, or too few bytes. Copy the checkpoint again"
                )
            total += count
        if total != entry.size.numel():
            raise CheckpointError(_TWICE_OR_MISSING.format(self.directory, key, METADATA))
        self._checked.add(key)

    def _check_archives(self, items: Sequence[ReadItem]) -> None:
        """Refuses archives that hold more than their own bytes: packed, they could fill any memory."""
        places = {(each.relative_path, each.offset): each for each in map(self._place, items)}
        for name, of_file in groupby(sorted(places), key=itemgetter(0)):
            file = self.directory / name
            with open(open_input(file, self.directory), "rb") as opened:
                for at in of_file:
                    _check_archive(opened, places[at].offset, places[at].length)

    def _place(self, item: ReadItem) -> _StorageInfo:
        place: _StorageInfo = self._metadata.storage_data[item.storage_index]
        return place

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        problems = []
        for name, size in sorted(needed.items()):
            file = self.directory / name
            refuse_leaving(file, self.directory)
            try:
                found = file.stat()
            except FileNotFoundError:
                problems.append(f"{name}: missing")
                continue
            except OSError as error:
                problems.append(f"{name}: {error.strerror}")
                continue
            if not stat.S_ISREG(found.st_mode):
                problems.append(f"{name}: not a file")
            elif found.st_size < size:
                problems.append(f"{name}: truncated, {found.st_size:,} of at least {size:,} bytes")
        if problems:
            raise CheckpointError(f"{self.directory} is damaged:{listing(problems)}\nCopy these files again")


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        if self._at < 0:
            raise ValueError("before the beginning")
        return self._at

    def readinto(self, memory: Any) -> int:
        data = os.pread(self._file.fileno(), max(min(len(memory), self._length - self._at), 0), self._begin + self._at)
        memory[: len(data)] = data
        self._at += len(data)
        return len(data)


def _check_archive(file: BinaryIO, begin: int, length: int) -> None:
    try:
        with zipfile.ZipFile(_Part(file, begin, length)) as archive:
            members = archive.infolist()
            unpacked = sum(each.file_size for each in members)
            for each in members:
                if unpacked <= length and each.filename.lower().endswith("data.pkl"):
                    check_tensor_pickle(archive.read(each))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        raise ValueError("the bytes of a tensor are damaged, copy the files again") from error
    if unpacked > length:
        raise ValueError(
            f"{length:,} bytes of a tensor unpack to {unpacked:,}, and torch.save does not pack. Do not use this "
            "checkpoint unless you trust its source"
        )


class _Into(DefaultLoadPlanner):
    """Reads into given tensors."""

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._targets[index.fqn]


def _renamed(item: ReadItem, target: str) -> ReadItem:
    return ReadItem(
        item.type,
        MetadataIndex(target),
        item.dest_offsets,
        item.storage_index,
        item.storage_offsets,
        item.lengths,
    )
