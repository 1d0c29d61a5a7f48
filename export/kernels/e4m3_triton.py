"""E4M3 codes on a GPU: MXFP8 in one pass, and the two passes of FP8, the bytes of `mx` and `scaled`.

A code is a division and a conversion, which is done in integers (`floats_triton.to_e4m3`). The division is IEEE: 3
bytes move for an element, which leaves an H100 time for it. Where scales come from the weight itself, FP8 reads it
twice, for the scale first: a row or a square block is more than a program holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from amaxbridge.export.kernels.amax_triton import tensor_amax, widened
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.e2m1_triton import mx_exponent, power_of_two
from amaxbridge.export.kernels.floats_triton import (
    aligned,
    amax_of,
    halves,
    larger,
    on,
    options,
    report,
    rounded,
    to_e4m3,
    words,
)

_WARPS = 4
_THREADS = 32 * _WARPS
_COLUMNS = 16  # what columns, and the width of a block, must divide by


def fits(weight: Tensor, width: int) -> bool:
    """Whether `encode` and `largest` take a weight with scales for so many columns."""
    return weight.shape[1] % _COLUMNS == 0 and width % _COLUMNS == 0 and weight.numel() > 0


def quantize_mxfp8(weight: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """Codes E4M3 `[out, in]`, exponents uint8 `[out, in/32]` and a flag that is 1 if the weight is not finite."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(rows, columns // 32, dtype=torch.uint8, device=weight.device)
    bad = torch.zeros(1, dtype=torch.int32, device=weight.device)
    if scales.numel():
        with on(weight.device):
            _mxfp8[(triton.cdiv(scales.numel(), _THREADS),)](
                words(weight),
                codes.view(-1).view(torch.int16),
                scales,
                bad,
                scales.numel(),
                MODELOPT=arithmetic is Arithmetic.MODELOPT,
                N=_THREADS,
                num_warps=_WARPS,
                **options(weight),
            )
    return codes, scales, bad


def encode(weight: Tensor, factor: Tensor, height: int, width: int, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Codes E4M3 `[out, in]` and a flag, as `quantize_mxfp8`.

    Args:
        factor: `[blocks down, blocks across]`, of blocks of `height` rows and `width` columns.
        arithmetic: compressed-tensors divides by the factor in the weight's dtype, ModelOpt multiplies in fp32.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    bad = torch.zeros(1, dtype=torch.int32, device=weight.device)
    tile = 2 * _THREADS
    with on(weight.device):
        _encode[(rows, triton.cdiv(columns, 8 * tile))](
            words(weight),
            factor.float().contiguous(),
            codes.view(-1).view(torch.int16),
            bad,
            columns,
            height,
            width,
            factor.shape[1],
            DIVIDE=arithmetic is Arithmetic.COMPRESSED_TENSORS,
            N=tile,
            num_warps=_WARPS,
            **options(weight),
        )
    return codes, bad


def largest(weight: Tensor, height: int, width: int, shape: tuple[int, int]) -> Tensor:
    """The amax of each block, fp32 `[blocks down, blocks across]`; NaN or Inf where a block holds one."""
    if shape == (1, 1):
        return tensor_amax([weight]).reshape(shape)
    found = torch.empty(shape, dtype=torch.float32, device=weight.device)
    across = min(triton.next_power_of_2(width), 4096)
    with on(weight.device):
        _largest[shape](
            aligned(weight),
            found,
            *weight.shape,
            height,
            width,
            R=min(triton.next_power_of_2(height), 4096 // across),
            C=across,
            num_warps=_WARPS,
            **options(weight),
        )
    return found


@triton.jit
def _mxfp8(
    words,
    codes,
    scales,
    bad,
    blocks,
    MODELOPT: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
    N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = block < blocks
    at = (block * 16)[:, None] + tl.arange(0, 4)[None, :]
    mask = inside[:, None]
    even, odd = halves(tl.load(words + at, mask=mask, other=0), dtype)
    even_2, odd_2 = halves(tl.load(words + at + 4, mask=mask, other=0), dtype)
    even_3, odd_3 = halves(tl.load(words + at + 8, mask=mask, other=0), dtype)
    even_4, odd_4 = halves(tl.load(words + at + 12, mask=mask, other=0), dtype)
    first_half = larger(amax_of(even, odd), amax_of(even_2, odd_2))
    amax = larger(first_half, larger(amax_of(even_3, odd_3), amax_of(even_4, odd_4)))
    report(bad, amax, inside)
    exponent = mx_exponent(amax, 448.0, 8, MODELOPT, dtype)
    tl.store(scales + block, exponent.to(tl.uint8), mask=inside)

    factor = power_of_two(254 - exponent)[:, None]
    tl.store(codes + at, _two(even * factor, odd * factor), mask=mask)
    tl.store(codes + at + 4, _two(even_2 * factor, odd_2 * factor), mask=mask)
    tl.store(codes + at + 8, _two(even_3 * factor, odd_3 * factor), mask=mask)
    tl.store(codes + at + 12, _two(even_4 * factor, odd_4 * factor), mask=mask)


@triton.jit
def _encode(
    words,
    factors,
    codes,
    bad,
    columns,
    height,
    width,
    across,
    DIVIDE: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    eight = tl.program_id(1) * N + tl.arange(0, N)  # columns of one block
    inside = eight * 8 < columns
    factor = tl.load(factors + (row // height) * across + eight * 8 // width, mask=inside, other=1.0)[:, None]
    at = row * (columns // 2) + (eight * 4)[:, None] + tl.arange(0, 4)[None, :]
    even, odd = halves(tl.load(words + at, mask=inside[:, None], other=0), dtype)
    report(bad, amax_of(even, odd), inside)
    if DIVIDE:
        even = rounded(tl.div_rn(even, factor), dtype, INTERPRETED)
        odd = rounded(tl.div_rn(odd, factor), dtype, INTERPRETED)
    else:
        even, odd = even * factor, odd * factor
    tl.store(codes + at, _two(even, odd), mask=inside[:, None])


@triton.jit
def _largest(
    values,
    found,
    rows,
    columns,
    height,
    width,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    down, across = tl.program_id(0), tl.program_id(1)
    last_row = tl.minimum(rows, (down + 1) * height)
    last_column = tl.minimum(columns, (across + 1) * width)
    amax = tl.zeros((R, C), tl.float32)
    for first_row in range(down * height, last_row, R):
        row = (first_row + tl.arange(0, R))[:, None]
        for first_column in range(across * width, last_column, C):
            column = (first_column + tl.arange(0, C))[None, :]
            at = row.to(tl.int64) * columns + column
            value = tl.load(values + at, mask=(row < last_row) & (column < last_column), other=0.0)
            amax = larger(amax, tl.abs(widened(value, dtype)))
    tl.store(found + down * tl.num_programs(1) + across, tl.reduce(tl.reduce(amax, 1, larger), 0, larger))


@triton.jit
def _two(even, odd):
    """Two E4M3 codes as an int16, the even column in the low byte."""
    return (to_e4m3(even) | (to_e4m3(odd) << 8)).to(tl.int16)
