"""Legacy checkpoints (`--ckpt-format torch`) as a `StoredSource`: whole tensors of the shards of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from amaxbridge.bridge.stored.legacy_ranks import RankFiles, Shard
from amaxbridge.bridge.stored.stored_source import Join, Region
from amaxbridge.mappings.names import is_quantizer_state, kind_of
from amaxbridge.mappings.tensors import TensorSpec

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def _without_mappings(name: str, shards: Sequence[Tensor]) -> Tensor:
    """What is known without a family: the rows of the vocabulary. Else the first shard stands for the tensor."""
    return torch.cat(tuple(shards)) if name in _VOCABULARY else shards[0]


@dataclass(frozen=True)
class LegacyCheckpoint:
    """A legacy checkpoint; see `StoredSource`.

    Args:
        ranks: its files.
        join: makes a whole tensor of shards.
    """

    ranks: RankFiles
    join: Join = _without_mappings

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Opens an iteration's directory.

        Raises:
            CheckpointError: as `RankFiles`.
        """
        return cls(RankFiles(directory))

    @property
    def directory(self) -> Path:
        return self.ranks.directory

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        known: dict[tuple[object, ...], TensorSpec] = {}
        specs = {}
        for name in self.ranks.shards:
            shards = [shard.tensor.place for shard in self._shards(name)]
            key = kind_of(name), *map(TensorSpec.of, shards)
            if key not in known:
                known[key] = TensorSpec.of(self.join(name, shards))
            specs[name] = known[key]
        return specs

    @property
    def states(self) -> Sequence[str]:
        return list(self.ranks.states)

    def spec(self, region: Region) -> TensorSpec:
        whole = self.tensors[region.key]
        return TensorSpec(whole.shape[len(region.index) :], whole.dtype)

    def cuts(self, region: Region) -> Sequence[int]:
        """The first row alone: the rows of a joined tensor are in the order of one rank."""
        del region
        return [0]

    def read(self, regions: Sequence[Region]) -> list[Tensor]:
        return [self._read(region.key)[region.index].contiguous() for region in regions]

    def state(self, key: str) -> Any:
        chunk, value = self.ranks.states[key]
        return chunk.state(key, value)

    def arguments(self) -> Any:
        return self.ranks.arguments

    def whole(self, join: Join) -> "LegacyCheckpoint":
        return replace(self, join=join)

    def _read(self, name: str) -> Tensor:
        return self.join(name, [shard.read() for shard in self._shards(name)])

    def _shards(self, name: str) -> Sequence[Shard]:
        """One shard of each rank that has a part; of a quantizer's one number that of every rank, which may differ."""
        held = self.ranks.shards[name]
        if name.endswith("amax") and is_quantizer_state(name) and held[0].tensor.place.numel() == 1:
            return held
        return [shard for _, shard in sorted({shard.index: shard for shard in reversed(held)}.items())]
