"""Amax from the scales of a quantized checkpoint, such that the same scales follow from it, to the bit.

A scale is made by divisions that round, so the computed inverse may miss the right amax by a bit. Its neighbours are
tried. If none gives the scale (no fp32 amax makes some of llm-compressor's divisors), the nearest amax is returned.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.export.kernels.nvfp4 import SCALE_RANGE
from amaxbridge.export.kernels.nvfp4_scales import input_global_scales
from amaxbridge.export.kernels.scaled import usable

_ULPS = (0, 1, -1, 2, -2, 3, -3, 4, -4)  # the two divisions are off by three ulps at most


@dataclass(frozen=True, slots=True)
class SharedScale:
    """A scale of one number, fp32, that all members of a fused group share.

    Args:
        tensor: its local name: `weight_global_scale`.
        span: what an amax becomes: the largest code, times the largest block scale if there are block scales.
        is_divisor: NVFP4's, stored as `2688 / amax`, not as `amax / span`. Engines keep the largest divisor of a fused
            group for all members; members under another multiplier they quantize once more.
        shape: of the stored tensor: one dim in compressed-tensors, none in ModelOpt's format.
    """

    tensor: str
    span: float
    is_divisor: bool = False
    shape: tuple[int, ...] = (1,)

    def stored(self, amax: Tensor) -> Tensor:
        """fp32, in ModelOpt's arithmetic, where a divisor is the reciprocal of a multiplier."""
        return self.stored_of_groups(amax.reshape(1))[0]

    def stored_of_groups(self, amax: Tensor) -> Tensor:
        """As `stored`, for several fused groups: fp32 `[n, …]` from `[n]`."""
        if self.is_divisor:
            return input_global_scales(amax).reshape(-1, *self.shape)
        span = torch.full_like(amax, self.span, dtype=torch.float32)
        return (usable(amax.float(), span) / span).reshape(-1, *self.shape)

    def amax(self, stored: Tensor) -> Tensor:
        """fp32, 0-d, that `stored` is made from."""
        scale = stored.reshape(())
        return amax_of_divisor(scale) if self.is_divisor else amax_of_scale(scale, self.span)

    def implied(self, value: float) -> float:
        """The amax that a number on the disk says, but for rounding."""
        return self.span / value if self.is_divisor else self.span * value


def amax_of_divisor(divisor: Tensor) -> Tensor:
    """The amax of an NVFP4 global scale, fp32, 0-d: `1 / (amax / 2688)` is the divisor, for weights and inputs."""
    span = torch.full((), SCALE_RANGE)
    return _restore(divisor.reshape(()), lambda amax: (amax / span).reciprocal(), span.double() / divisor.double())


def amax_of_scale(scale: Tensor, bound: float) -> Tensor:
    """The amax of each scale, fp32, in the shape of `scale`: `amax / bound` is the scale."""
    limit = torch.full((), bound)
    return _restore(scale.float(), lambda amax: amax / limit, scale.double() * bound)


def _restore(scale: Tensor, forward: Callable[[Tensor], Tensor], amax: Tensor) -> Tensor:
    bits = amax.float().reshape(scale.shape).view(torch.int32)
    restored = bits.clone()
    for ulps in reversed(_ULPS):  # the nearest comes last and wins
        restored = restored.where(forward((bits + ulps).view(torch.float32)) != scale, bits + ulps)
    return restored.view(torch.float32)
