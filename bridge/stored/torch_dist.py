"""Megatron's distributed checkpoints (`torch_dist`) on the disk: global tensors, read in parts, in any process.

A checkpoint is a directory of `.distcp` files and one `.metadata`, which says for every global tensor in which file
each of its chunks lies. PyTorch's own reader does the reading; no process group, no Megatron and no model is needed.

Checkpoints come from elsewhere, so no pickle in them may run code: PyTorch loads tensors with `weights_only`, states
    stay
bytes here (`inert_pickle` reads them), and `dist_metadata` reads `.metadata`.
"""

import hashlib
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
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.tensors import TensorSpec

RELEASE = "release"
"""Megatron's name, in place of an iteration, for weights that training starts from."""


def checkpoint_iteration(path: Path) -> Path:
    """The iteration directory of a Megatron checkpoint: `path` itself, or the latest one inside it.

    Raises:
        CheckpointError: there is no distributed checkpoint.
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


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a global tensor.

    Args:
        key: the tensor's name in the checkpoint.
        index: taken from its first dims, one number each: a layer, an expert. Empty for all of it.
    """

    key: str
    index: tuple[int, ...] = ()


class DistCheckpoint:
    """A distributed checkpoint, open for reading.

    Args:
        path: the training's save directory, or one `iter_NNNNNNN` in it.

    Raises:
        CheckpointError: not a distributed checkpoint, or files that are missing or too short; all are named.
    """

    def __init__(self, path: Path) -> None:
        self.directory = checkpoint_iteration(path)
        self._metadata = read_metadata(self.directory / METADATA)
        self._check_files()
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @cached_property
    def fingerprint(self) -> str:
        """Names this checkpoint: another one, or one that was written anew, has another."""
        digest = hashlib.sha256((self.directory / METADATA).read_bytes())
        for file in sorted(self.directory.iterdir()):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
        return digest.hexdigest()

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
        """The names of everything else: pickled state, `…/shard_0_1`."""
        entries = self._metadata.state_dict_metadata
        return [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]

    def spec(self, region: Region) -> TensorSpec:
        """Shape and dtype of a region."""
        whole = self.tensors[region.key]
        return TensorSpec(whole.shape[len(region.index) :], whole.dtype)

    def cuts(self, region: Region) -> list[int]:
        """Where along its first dim the ranks that saved it cut a region: the first row of each piece, from 0."""
        return sorted({chunk.offsets[len(region.index)] for chunk in self._entry(region).chunks})

    def read(self, regions: Sequence[Region]) -> list[Tensor]:
        """The tensors of some regions, on the CPU.

        Raises:
            CheckpointError: what the files hold is not what the metadata says.
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
        except Exception as error:  # whatever a damaged file makes torch raise
            keys = sorted({region.key for region in regions})
            # torch would advise to load such bytes with weights_only=False, which may run code
            damaged = isinstance(error, pickle.UnpicklingError)
            why = "the bytes of a tensor are damaged, copy the files again" if damaged else error
            raise CheckpointError(f"{self.directory} cannot be read: {why}; while reading{listing(keys)}") from error
        return [
            targets[str(number)].reshape(targets[str(number)].shape[len(region.index) :])
            for number, region in enumerate(regions)
        ]

    def state_bytes(self, key: str) -> bytes:
        """One state as it was pickled; `inert_pickle` reads it without running code."""
        place = self._metadata.storage_data[MetadataIndex(key)]
        with open(self.directory / place.relative_path, "rb") as file:
            file.seek(place.offset)
            return file.read(place.length)

    def _entry(self, region: Region) -> TensorStorageMetadata:
        """What the metadata says of a tensor, cut down to the chunks that hold the region's index."""
        entry = self._metadata.state_dict_metadata[region.key]
        assert isinstance(entry, TensorStorageMetadata)
        if not region.index:
            return entry
        depth = len(region.index)
        if (region.key, depth) not in self._chunks:  # a tensor of all experts has tens of thousands: sorted once
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
    """Puts what is read into given tensors."""

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
