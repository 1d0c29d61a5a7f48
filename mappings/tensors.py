"""The few tensor operations that mappings are made of: join shards, cut a shard, take a maximum.

They work on any device, on meta tensors too: the plan runs a mapping on meta tensors to learn the shapes of the
Hugging Face side before a byte is read, so there is no second shape logic that could disagree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor, known to a plan before the tensor is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype on the meta device, without storage."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def join_dim(shards: Sequence[Tensor], dim: int | None) -> Tensor:
    """The tensor whose equal shards along `dim` are `shards`, in rank order; the first one if dim is None."""
    if dim is None or len(shards) == 1:
        return shards[0]
    return torch.cat(tuple(shards), dim=dim)


def shard_of(tensor: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """Shard `rank` of `size` equal shards of `tensor` along `dim`, a view; all of it if dim is None.

    Raises:
        ValueError: the dimension does not divide by `size`.
    """
    if dim is None or size == 1:
        return tensor
    if dim >= tensor.ndim or tensor.shape[dim] % size:
        raise ValueError(f"shape {tuple(tensor.shape)} does not divide into {size} shards along dim {dim}")
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * length, length)


def join_sections(shards: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """The sections of a fused tensor, of which every rank has its share of each, in order.

    Args:
        shards: `[sum of rows / ranks, …]`, in rank order.
        rows: the rows of the whole sections.

    Raises:
        ValueError: the sections do not divide among the ranks.
    """
    if any(count % len(shards) for count in rows):
        raise ValueError(f"sections of {', '.join(map(str, rows))} rows do not divide into {len(shards)} shards")
    held = [count // len(shards) for count in rows]
    return [join_dim(parts, 0) for parts in zip(*(shard.split(held) for shard in shards), strict=True)]


def shard_of_sections(sections: Sequence[Tensor], rank: int, size: int) -> Tensor:
    """The inverse: the shares that `rank` of `size` has of whole sections, in one tensor."""
    return torch.cat([shard_of(section, 0, rank, size) for section in sections])


def max_of(tensors: Sequence[Tensor]) -> Tensor:
    """The element-wise maximum of tensors of one shape, in fp32. A NaN stays a NaN."""
    return torch.stack([tensor.float() for tensor in tensors]).amax(dim=0)
