"""Amax from the scales of a quantized checkpoint, such that the same scales follow from it, to the bit.

A scale is made by divisions that round, so the computed inverse may miss the right amax by a bit. Its neighbours are
tried. If none gives the scale (no fp32 amax makes some of llm-compressor's divisors), the nearest amax is returned.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from amaxbridge.export.kernels.nvfp4 import FP4_MAX, FP8_MAX

_ULPS = (0, 1, -1, 2, -2, 3, -3, 4, -4)  # the two divisions are off by three ulps at most


def amax_of_divisor(divisor: Tensor) -> Tensor:
    """The amax of an NVFP4 global scale, fp32, 0-d: `1 / (amax / 2688)` is the divisor, for weights and inputs."""
    span = torch.full((), FP4_MAX * FP8_MAX)
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
