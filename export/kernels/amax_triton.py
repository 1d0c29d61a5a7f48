"""Maxima on a GPU: of a fused group in one launch a weight, and of the blocks of one weight."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amaxbridge.export.kernels.floats_triton import aligned, larger, on, options

_TILE = 8192


def tensor_amax(weights: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of all weights, fp32, 0-d, on the device of the first; NaN if one holds NaN.

    Positive floats are ordered as their bits are, NaN last, so the maximum is an integer's, which the GPU combines by
    itself; the host waits for nothing.
    """
    found = torch.zeros(1, dtype=torch.int32, device=weights[0].device)
    for weight in weights:
        if weight.device != found.device:
            found = torch.maximum(found, tensor_amax([weight]).view(torch.int32).to(found.device))
            continue
        with on(weight.device):
            grid = (triton.cdiv(weight.numel(), _TILE),)
            _tensor_amax[grid](aligned(weight), found, weight.numel(), TILE=_TILE, num_warps=8, **options(weight))
    return found.view(torch.float32)[0]


@triton.jit
def _tensor_amax(values, found, size, dtype: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(values + at, mask=at < size, other=0.0)
    amax = tl.reduce(tl.abs(widened(value, dtype)), 0, larger)
    tl.atomic_max(found, amax.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def widened(value, dtype: tl.constexpr):
    """fp32 of values as they were read."""
    if dtype == tl.bfloat16:
        wide = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide
