"""A checkpoint whose tensors have other names."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from amaxbridge.bridge.stored.stored_source import Join, Region, StoredSource
from amaxbridge.mappings.tensors import TensorSpec


class RenamedSource:
    """A `StoredSource` over another one.

    Args:
        source: the checkpoint as it is.
        keys: name of a tensor here → its name there.
    """

    def __init__(self, source: StoredSource, keys: Mapping[str, str]) -> None:
        self.source, self.keys = source, keys

    @property
    def directory(self) -> Path:
        return self.source.directory

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        held = self.source.tensors
        return {name: held[key] for name, key in self.keys.items()}

    @property
    def states(self) -> Sequence[str]:
        return self.source.states

    def spec(self, region: Region) -> TensorSpec:
        return self.source.spec(self._there(region))

    def cuts(self, region: Region) -> Sequence[int]:
        return self.source.cuts(self._there(region))

    def read(self, regions: Sequence[Region]) -> list[Tensor]:
        return self.source.read([self._there(region) for region in regions])

    def state(self, key: str) -> Any:
        return self.source.state(key)

    def arguments(self) -> Any:
        return self.source.arguments()

    def whole(self, join: Join) -> StoredSource:
        return RenamedSource(self.source.whole(join), self.keys)

    def _there(self, region: Region) -> Region:
        return Region(self.keys[region.key], region.index)
