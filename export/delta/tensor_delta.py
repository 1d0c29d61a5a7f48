"""What changed in one tensor: positions and values where that is smaller, all of it where not.

Elements are compared and sent as they are stored, by their bits: an E2M1 pair or an E4M3 code is a byte, eight 4-bit
integers are a word. Codes of few bits change far less often than the weights that they are made of. Where the scale of
a fused group moves far, so many codes move with it that the whole tensor is smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.tensors import TensorSpec

_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GAPS = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """The change of one tensor.

    Args:
        spec: shape and dtype of the tensor, before and after.
        gaps: `[n]`: how many unchanged elements are before each changed one, in the smallest of four integer dtypes.
            None if `values` is the whole tensor.
        values: the changed elements, `[n]`, or the whole tensor.
    """

    spec: TensorSpec
    gaps: Tensor | None
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of what is sent."""
        return self.values.nbytes + (0 if self.gaps is None else self.gaps.nbytes)

    @property
    def positions(self) -> Tensor:
        """The flat positions of the changed elements, int64 `[n]`, ascending."""
        if self.gaps is None:
            return torch.arange(self.values.numel(), device=self.values.device)
        return (self.gaps.long() + 1).cumsum(0) - 1


def delta_of(base: Tensor | None, new: Tensor) -> TensorDelta:
    """The change from one tensor to another of the same shape and dtype.

    Args:
        base: the tensor before; None to take all of `new`.
    """
    spec = TensorSpec.of(new)
    if base is None:
        return TensorDelta(spec, None, new)
    assert TensorSpec.of(base) == spec, f"{TensorSpec.of(base)} became {spec}"
    positions = (bits(base) != bits(new)).nonzero().view(-1)
    return in_places(spec, positions, flat(new)[positions]) or TensorDelta(spec, None, new)


def deltas_of(bases: Sequence[Tensor], news: Sequence[Tensor]) -> list[TensorDelta]:
    """As `delta_of`, for tensors of one item size on one device, which are compared at once.

    What changed in places lies in CPU memory: a GPU is waited for twice, however many tensors there are.
    """
    before, after = (torch.cat([bits(tensor) for tensor in tensors]) for tensors in (bases, news))
    changed = (before != after).nonzero().view(-1)
    positions, values = changed.cpu(), after[changed].cpu()
    ends = torch.tensor([tensor.numel() for tensor in news]).cumsum(0)
    counts = torch.searchsorted(positions, ends).diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    begins = (ends - torch.tensor([tensor.numel() for tensor in news])).tolist()
    found = []
    for new, begin, at, value in zip(news, begins, positions.split(counts), values.split(counts), strict=True):
        spec = TensorSpec.of(new)
        found.append(in_places(spec, at - begin, value.view(spec.dtype)) or TensorDelta(spec, None, new))
    return found


def in_places(spec: TensorSpec, positions: Tensor, values: Tensor) -> TensorDelta | None:
    """The delta with these elements of a tensor; None if the whole tensor is not larger.

    Args:
        positions: int64 `[n]`, flat, ascending.
        values: `[n]`.
    """
    if not len(positions):
        return TensorDelta(spec, torch.empty(0, dtype=torch.uint8, device=values.device), values)
    gaps = _packed(positions.diff(prepend=positions.new_full((1,), -1)) - 1)
    return TensorDelta(spec, gaps, values) if values.nbytes + gaps.nbytes < spec.nbytes else None


def apply(delta: TensorDelta, base: Tensor | None) -> Tensor:
    """Changes `base` in place, or makes a new tensor where there is none; returns it.

    Raises:
        CheckpointError: the delta is of another tensor, or does not fit it.
    """
    if delta.gaps is None:
        if TensorSpec.of(delta.values) != delta.spec:
            raise CheckpointError(f"a delta with the whole of a tensor {delta.spec} has {TensorSpec.of(delta.values)}")
        return delta.values.clone() if base is None else base.copy_(delta.values)
    if base is None or TensorSpec.of(base) != delta.spec:
        held = "none" if base is None else TensorSpec.of(base)
        raise CheckpointError(f"a delta of {delta.spec} does not fit the tensor that is there: {held}")
    fits = delta.gaps.dtype in _GAPS and delta.gaps.shape == delta.values.shape == (delta.values.numel(),)
    if not fits or delta.values.dtype != delta.spec.dtype:
        raise CheckpointError(f"a delta of {delta.spec} has {TensorSpec.of(delta.values)} values: it is damaged")
    gaps = delta.gaps.long()
    if bool((gaps < 0).any()) or int(gaps.sum()) + len(gaps) > base.numel():
        raise CheckpointError(f"a delta of {delta.spec} has positions outside of it: it is damaged")
    bits(base)[delta.positions.to(base.device)] = bits(delta.values).to(base.device)
    return base


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, flat: a view."""
    return flat(tensor).view(_AS_BITS[tensor.itemsize])


def flat(tensor: Tensor) -> Tensor:
    """All elements in one dim; a view of a contiguous tensor."""
    return tensor.detach().contiguous().view(-1)


def _packed(gaps: Tensor) -> Tensor:
    """The gaps in the smallest integers that hold them all."""
    greatest = int(gaps.max())
    dtype = next(dtype for dtype in _GAPS if greatest <= torch.iinfo(dtype).max)
    return gaps.to(dtype)
