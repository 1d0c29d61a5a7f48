"""Megatron's distributed checkpoints (`torch_dist`) on the disk: global tensors, read region by region, in any process.

A checkpoint is a directory of `.distcp` files and one `.metadata`, which gives the file of each chunk of each global
tensor. PyTorch's own reader reads it; no process group, Megatron or model is needed.

Checkpoints are untrusted, so no pickle in them may run code: PyTorch loads tensors with `weights_only`, states are
returned as bytes (`inert_pickle` reads them), and `dist_metadata` reads `.metadata`.
"""

import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from amaxbridge.bridge.stored.checkpoint_kinds import LATEST, METADATA, why_not
from amaxbridge.bridge.stored.dist_metadata import read_metadata
from amaxbridge.export.disk.input_paths import checked_name, refuse_leaving
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.tensors import TensorSpec

RELEASE = "release"
"""Megatron's name, in place of an iteration, for the initial weights of a training."""


def checkpoint_iteration(path: Path) -> Path:
    """The iteration directory of a Megatron checkpoint: `path` itself, or the latest one inside it.

    Raises:
        CheckpointError: `path` has no distributed checkpoint.
    """
    latest = path / LATEST
    directory = path
    if latest.is_file():
        iteration = latest.read_text(errors="replace").strip()
        name = f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
        directory = path / checked_name(name, latest) if name else path
    if not (directory / METADATA).is_file():
        looked_at = directory if directory.exists() else path
        raise CheckpointError(
            f"{directory} is not a Megatron distributed checkpoint (torch_dist): {why_not(looked_at)}"
        )
    return directory


def files_of(path: Path, *, hashed: bool = False) -> SourceFiles:
    """The files of a distributed checkpoint, as they are now; take them before it is opened.

    Args:
        path: as for `DistCheckpoint`.
        hashed: as in `SourceFiles`.
    """
    directory = checkpoint_iteration(path)
    return SourceFiles.of(directory, [file.name for file in directory.iterdir() if file.is_file()], hashed=hashed)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a global tensor.

    Args:
        key: the tensor's name in the checkpoint.
        index: numbers along its first dims: a layer, an expert. Empty for the whole tensor.
    """

    key: str
    index: tuple[int, ...] = ()


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
            targets[str(number)] = torch.empty((*ones, *spec.shape), dtype=spec.dtype)
            wanted = ChunkStorageMetadata(
                torch.Size((*region.index, *(0 for _ in spec.shape))), torch.Size((*ones, *spec.shape))
            )
            found = create_read_items_for_chunk_list(region.key, self._entry(region), [wanted])
            if sum(item.lengths.numel() for item in found) != targets[str(number)].numel():
                raise CheckpointError(f"{self.directory}: {region.key} has chunks missing or twice in {METADATA}")
            items += [_renamed(item, str(number)) for item in found]
        try:
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

    def state_bytes(self, key: str) -> bytes:
        """The bytes of one pickled state; `inert_pickle` reads them without running code."""
        place = self._metadata.storage_data[MetadataIndex(key)]
        with open(self.directory / place.relative_path, "rb") as file:
            file.seek(place.offset)
            return file.read(place.length)

    def _entry(self, region: Region) -> TensorStorageMetadata:
        """The metadata of a tensor, reduced to the chunks that hold the region's index."""
        entry = self._metadata.state_dict_metadata[region.key]
        assert isinstance(entry, TensorStorageMetadata)
        if not region.index:
            return entry
        depth = len(region.index)
        if (region.key, depth) not in self._chunks:  # sorted once: there may be tens of thousands
            chunks = self._chunks[region.key, depth] = defaultdict(list)
            for chunk in entry.chunks:
                spans = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for index in product(*(range(begin, begin + size) for begin, size in spans)):
                    chunks[index].append(chunk)
        return replace(entry, chunks=self._chunks[region.key, depth][region.index])

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        problems = []
        for name, size in sorted(needed.items()):
            file = self.directory / name
            refuse_leaving(file, self.directory)
            if not file.is_file():
                problems.append(f"{name}: missing")
            elif file.stat().st_size < size:
                problems.append(f"{name}: truncated, {file.stat().st_size:,} of at least {size:,} bytes")
        if problems:
            raise CheckpointError(f"{self.directory} is damaged:{listing(problems)}\nCopy these files again")


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
