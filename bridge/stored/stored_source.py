"""What a checkpoint format must answer. Everything after it (model, arguments, plan) is the same for all formats.

A format is one file with one class, and one line in `open_checkpoint`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from amaxbridge.mappings.tensors import TensorSpec

type Join = Callable[[str, Sequence[Tensor]], Tensor]
"""A tensor's name and the shards of all ranks → the whole tensor. Works on meta tensors."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a global tensor.

    Args:
        key: the tensor's name in the checkpoint.
        index: numbers along its first dims: a layer, an expert. Empty for the whole tensor.
    """

    key: str
    index: tuple[int, ...] = ()


class StoredSource(Protocol):
    """A checkpoint that training saved, open for reading: tensors and states under Megatron's names.

    The names begin as those of a bare model (`decoder.`, `embedding.`), with global numbers of layers and experts;
    `stored_model` lists their spellings. A checkpoint is untrusted: nothing in it may run code.
    """

    @property
    def directory(self) -> Path:
        """The directory of this iteration, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name, those of an optimizer included."""

    @property
    def states(self) -> Sequence[str]:
        """The names of the states of modules, `MODULE._extra_state/shard_INDEX_COUNT`, and of all other states."""

    def spec(self, region: Region) -> TensorSpec:
        """Shape and dtype of a region."""

    def cuts(self, region: Region) -> Sequence[int]:
        """The first row of each part of a region, along its first dim, where the saving ranks cut it."""

    def read(self, regions: Sequence[Region]) -> list[Tensor]:
        """The tensors of some regions, on the CPU.

        Raises:
            CheckpointError: the files do not hold what they should.
        """

    def state(self, key: str) -> Any:
        """A state: the bytes of `torch.save` or of a pickle, or what they hold, as `inert_pickle` reads it."""

    def arguments(self) -> Any:
        """The arguments of training as `inert_pickle` reads them, None if there are none.

        Raises:
            CheckpointError: they cannot be read.
        """

    def whole(self, join: Join) -> "StoredSource":
        """The checkpoint with whole tensors: a format that keeps ranks' shards apart joins them so."""
