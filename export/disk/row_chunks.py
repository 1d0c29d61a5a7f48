"""Chunks of rows, so that a tensor need not fit into memory: what a scheme quantizes and what is written.

A weight `[out, in]` is quantized some rows at a time. `Rows` yields them from a tensor in memory or from a file. What
one chunk cannot tell, the amax of the tensor or of its fused group, is measured beforehand.
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

    A tensor without dims, and one row without its first dim (an expert in a packed tensor), are written this way, too.
    """

    name: str
    first: int
    rows: Tensor


class Rows(Protocol):
    """A tensor that can be read in parts, as often as needed."""

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of the whole tensor."""

    def parts(self, step: int = 1, *, again: bool = False) -> Iterator[Part]:
        """Yields all rows in order. Each part begins at a multiple of `step` and is valid until the next is taken.

        Args:
            again: True if the rows are read once more right afterwards, so that they may stay in memory.
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
