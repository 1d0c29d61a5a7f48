"""Rows of a weight: what a scheme works on, and what is written, when a tensor is too large to be held.

A weight `[out, in]` is quantized a part of its rows at a time. `Rows` is where they come from: a tensor in memory, or a
file. What does not follow from one part alone, the amax of the tensor or of its fused group, is measured before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from amaxbridge.mappings.tensors import TensorSpec


class Part(NamedTuple):
    """Consecutive rows of a tensor: the number of the first one, and the rows."""

    first: int
    rows: Tensor


class Written(NamedTuple):
    """Rows on their way to the disk: the planned tensor's name, the number of the first row, the rows.

    A tensor without dims, or one row without its first dim (an expert in a packed tensor), is written so too.
    """

    name: str
    first: int
    rows: Tensor


class Rows(Protocol):
    """A tensor that can be gone through in parts, as often as is needed."""

    @property
    def spec(self) -> TensorSpec:
        """Of the whole tensor."""

    def parts(self, step: int = 1, *, again: bool = False) -> Iterator[Part]:
        """All rows, in order. Every part begins at a multiple of `step`; it is valid until the next one is taken.

        Args:
            again: whether they are gone through once more right after, so that they may stay in memory.
        """


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor in memory, in one part."""

    tensor: Tensor

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec.of(self.tensor)

    def parts(self, step: int = 1, *, again: bool = False) -> Iterator[Part]:
        yield Part(0, self.tensor)
