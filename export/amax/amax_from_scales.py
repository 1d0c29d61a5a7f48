"""Amax from the scales of a quantized checkpoint, so that the scales made from it are the stored ones to the bit.

A scale is made by divisions that round, so its inverse, computed, may be a bit beside an amax that gives it back. The
neighbours are tried; where none fits (a divisor that no fp32 amax makes, as llm-compressor rounds some), it is the
nearest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from amaxbridge.export.kernels.nvfp4 import FP4_MAX, FP8_MAX

_ULPS = (0, 1, -1, 2, -2, 3, -3, 4, -4)  # both divisions together are off by three at most


def amax_of_divisor(divisor: Tensor) -> Tensor:
    """fp32, 0-d, of NVFP4's global scale: `1 / (amax / 2688)` is the divisor again, for weights and for inputs."""
    span = torch.full((), FP4_MAX * FP8_MAX)
    return _restore(divisor.reshape(()), lambda amax: (amax / span).reciprocal(), span.double() / divisor.double())


def amax_of_scale(scale: Tensor, bound: float) -> Tensor:
    """fp32 of the shape of the scales: `amax / bound` are the scales again."""
    limit = torch.full((), bound)
    return _restore(scale.float(), lambda amax: amax / limit, scale.double() * bound)


def _restore(scale: Tensor, forward: Callable[[Tensor], Tensor], amax: Tensor) -> Tensor:
    bits = amax.float().reshape(scale.shape).view(torch.int32)
    restored = bits.clone()
    for ulps in reversed(_ULPS):  # the nearest is tried last and wins
        restored = restored.where(forward((bits + ulps).view(torch.float32)) != scale, bits + ulps)
    return restored.view(torch.float32)
