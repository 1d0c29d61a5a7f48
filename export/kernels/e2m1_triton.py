"""NVFP4 and MXFP4 on a GPU: block scales, codes and packing in one pass, the bytes of `nvfp4` and `mx`.

A weight of 16 bits is 2 bytes in and 0.56 out for an element, so at 3 TB/s an H100 has time for about 110 instructions
of a lane for four elements. Where they go:

- **Division.** An IEEE division is 10 instructions and two slow ones an element. The elements of a block share
  their divisor, so its reciprocal is made once, as the sum of two floats, `high + low`, and a quotient is
  `fma(x, high, x * low)`: right to 2^-47 before its only rounding. That is not always the IEEE quotient, but it falls
  on the same side of each bound between codes, for every bf16 and fp16: the exact quotient of a significand of 11 bits
  lies on the bound, or further from where fp32 rounds to it than 2^-47. The one exception, a divisor of all ones, is
  why `low` has its second term. `test_triton.py` proves it again on numbers. fp32 weights have no such gap, nor
  do divisors outside of fp32's middle: they take `div_rn`.
- **Rounding.** E2M1 is three ranges of even steps: 1/2 up to 2, 1 up to 4, 2 up to 6. So a code is the sum of three
  rounded numbers: of the part of the quotient that lies in each range, clamped to it (free on most instructions)
  and added to a float whose own step it is. Ties go to even in each, and so in E2M1. This is 7 instructions, six
  of them floating point, of which the GPU does twice as many as of integer ones. The way of the CPU, seven comparisons
  with integer bounds from tables, is 14 on the slow side, and its tables cost a dozen launches a group.
- **Scales.** About 30 instructions a block of 16, without tables.

A thread takes a whole block of NVFP4: two reads of 16 bytes, a write of 8, no exchange with its neighbours.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.e2m1 import empty_codes
from amaxbridge.export.kernels.floats_triton import (
    amax_of,
    from_e4m3,
    halves,
    larger,
    on,
    options,
    report,
    to_bf16,
    to_e4m3,
    words,
)

_WARPS = 4


def quantize_nvfp4(
    weight: Tensor,
    *,
    arithmetic: Arithmetic,
    amax: float,
    divisor: float,
    factor_2: float,
    block_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 `[out, in/2]`, scales E4M3 `[out, in/16]` and a flag that is 1 if the weight is not finite.

    Args:
        weight: bf16, fp16 or fp32 `[out, in]`, in divisible by 16.
        arithmetic: whose rounding.
        amax, divisor, factor_2: of the fused group; fp32 numbers.
        block_amax: `[out, in/16]`, calibrated.
    """
    six = torch.tensor([6.0])
    divisor_of_amax = six * torch.tensor([factor_2]) if block_amax is None else torch.tensor([amax]) / six
    numbers = _Numbers(divisor_of_amax.item(), factor_2, divisor, _is_usual(amax))
    return _quantize_nvfp4(weight, arithmetic, numbers, None, block_amax, None)


def quantize_nvfp4_stack(
    weights: Tensor,
    *,
    arithmetic: Arithmetic,
    amax: Tensor,
    divisors: Tensor,
    factors_2: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize_nvfp4`, in one launch for equal weights one below the other, each under its own scales.

    Args:
        weights: `[n · out, in]`.
        amax, divisors, factors_2: fp32 `[n]`, on the CPU.
        into: uint8 tensors for codes and scales; None for new ones.
    """
    of_weights = torch.stack([torch.full_like(factors_2, 6.0) * factors_2, factors_2, divisors])
    usual = _is_usual(amax.min().item()) and _is_usual(amax.max().item())
    of_weights = of_weights.to(weights.device, non_blocking=True)
    return _quantize_nvfp4(weights, arithmetic, _Numbers(0.0, 0.0, 0.0, usual), of_weights, None, into)


class _Numbers(NamedTuple):
    """The numbers of a fused group; `usual` allows the fast division."""

    divisor_of_amax: float
    factor_2: float
    divisor: float
    usual: bool


def _is_usual(amax: float) -> bool:
    return 2.0**-20 <= amax <= 2.0**16


def _quantize_nvfp4(
    weight: Tensor,
    arithmetic: Arithmetic,
    numbers: _Numbers,
    of_weights: Tensor | None,
    block_amax: Tensor | None,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launch. `of_weights` `[3, n]` replaces `numbers` for a stack of weights."""
    rows, columns = weight.shape
    codes, scales, bad = _outputs(weight, 16, into)
    fast = weight.dtype != torch.float32 and block_amax is None and numbers.usual
    arguments = options(weight)
    blocks = rows * columns // 16
    threads = 32 * _WARPS
    if blocks:
        with on(weight.device):
            _nvfp4[(triton.cdiv(blocks, threads),)](
                words(weight),
                codes.view(-1).view(torch.int64),
                scales,
                scales if block_amax is None else block_amax.to(weight.device, torch.float32).contiguous(),
                bad,
                blocks,
                numbers.divisor_of_amax,
                numbers.factor_2,
                numbers.divisor,
                scales if of_weights is None else of_weights,
                1 if of_weights is None else of_weights.shape[1],
                1 if of_weights is None else blocks // of_weights.shape[1],
                STACKED=of_weights is not None,
                MODELOPT=arithmetic is Arithmetic.MODELOPT,
                STATIC=block_amax is not None,
                FAST=fast and not arguments["INTERPRETED"],
                N=threads,
                num_warps=_WARPS,
                **arguments,
            )
    return codes, scales.view(torch.float8_e4m3fn), bad


def quantize_mxfp4(weight: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 `[out, in/2]`, exponents uint8 `[out, in/32]` and a flag, as `quantize_nvfp4`."""
    codes, scales, bad = _outputs(weight, 32)
    blocks, threads = scales.numel(), 32 * _WARPS
    if blocks:
        with on(weight.device):
            _mxfp4[(triton.cdiv(blocks, threads),)](
                words(weight),
                codes.view(-1).view(torch.int64),
                scales,
                bad,
                blocks,
                MODELOPT=arithmetic is Arithmetic.MODELOPT,
                N=threads,
                num_warps=_WARPS,
                **options(weight),
            )
    return codes, scales, bad


def _outputs(weight: Tensor, width: int, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = empty_codes(weight, width) if into is None else into
    return codes, scales, torch.zeros(1, dtype=torch.int32, device=weight.device)


@triton.jit
def _nvfp4(
    words,
    codes,
    scales,
    block_amax,
    bad,
    blocks,
    divisor_of_amax,
    factor_2,
    divisor,
    of_weights,
    count,
    blocks_each,
    STACKED: tl.constexpr,
    MODELOPT: tl.constexpr,
    STATIC: tl.constexpr,
    FAST: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
    N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = block < blocks
    at = (block * 8)[:, None] + tl.arange(0, 4)[None, :]
    even, odd = halves(tl.load(words + at, mask=inside[:, None], other=0), dtype)
    even_2, odd_2 = halves(tl.load(words + at + 4, mask=inside[:, None], other=0), dtype)
    amax = larger(amax_of(even, odd), amax_of(even_2, odd_2))
    report(bad, amax, inside)
    if STACKED:
        of_weight = of_weights + block // blocks_each
        divisor_of_amax = tl.load(of_weight, mask=inside, other=1.0)
        factor_2 = tl.load(of_weight + count, mask=inside, other=1.0)
        divisor = tl.load(of_weight + 2 * count, mask=inside, other=1.0)

    if STATIC:
        scale = tl.div_rn(tl.load(block_amax + block, mask=inside, other=1.0), 6.0)
        scale = tl.div_rn(tl.where(scale == 0.0, 1.0, scale) * 448.0, divisor_of_amax)
        code = to_e4m3(tl.clamp(scale, 0.001953125, 448.0))
    elif MODELOPT:
        scale = tl.div_rn(amax, divisor_of_amax)
        code = to_e4m3(tl.clamp(tl.where(scale == 0.0, 1.0, scale), 0.001953125, 448.0))
    else:
        scale = tl.div_rn(amax, 6.0)
        if dtype == tl.bfloat16:
            scale = to_bf16(scale)
        code = to_e4m3(scale * divisor)
        code = tl.where(code == 0, 0x20, code).to(tl.uint8)  # 0.125
    tl.store(scales + block, code, mask=inside)
    step = from_e4m3(code) * factor_2 if MODELOPT else tl.div_rn(from_e4m3(code), divisor)

    if FAST:
        high = tl.div_rn(1.0, 2.0 * step)
        error = tl.fma(-high, 2.0 * step, 1.0)
        low = high * tl.fma(error, error, error)
        word = _eight(_half(even, high, low), even < 0, _half(odd, high, low), odd < 0)
        word_2 = _eight(_half(even_2, high, low), even_2 < 0, _half(odd_2, high, low), odd_2 < 0)
    else:
        word = _eight_exactly(even, odd, step)
        word_2 = _eight_exactly(even_2, odd_2, step)
    tl.store(codes + block, _pair(word, word_2), mask=inside)


@triton.jit
def _mxfp4(
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
    at = words + (block * 16)[:, None] + tl.arange(0, 4)[None, :]
    even, odd = halves(tl.load(at, mask=inside[:, None], other=0), dtype)
    even_2, odd_2 = halves(tl.load(at + 4, mask=inside[:, None], other=0), dtype)
    even_3, odd_3 = halves(tl.load(at + 8, mask=inside[:, None], other=0), dtype)
    even_4, odd_4 = halves(tl.load(at + 12, mask=inside[:, None], other=0), dtype)
    first_half = larger(amax_of(even, odd), amax_of(even_2, odd_2))
    amax = larger(first_half, larger(amax_of(even_3, odd_3), amax_of(even_4, odd_4)))
    report(bad, amax, inside)
    exponent = mx_exponent(amax, 6.0, 2, MODELOPT, dtype)
    tl.store(scales + block, exponent.to(tl.uint8), mask=inside)

    half = power_of_two(254 - exponent) * 0.5
    zero = power_of_two(exponent)  # times the largest that rounds to zero
    if MODELOPT or dtype == tl.float32:
        zero = zero * 2.0**-75 * 2.0**-75
    elif dtype == tl.bfloat16:
        zero = zero * 2.0**-67 * 2.0**-67
    else:
        zero = zero * 2.0**-25
    first = _pair(_eight_by_powers(even, odd, half, zero), _eight_by_powers(even_2, odd_2, half, zero))
    second = _pair(_eight_by_powers(even_3, odd_3, half, zero), _eight_by_powers(even_4, odd_4, half, zero))
    tl.store(codes + block * 2, first, mask=inside)
    tl.store(codes + block * 2 + 1, second, mask=inside)


@triton.jit
def mx_exponent(amax, LARGEST: tl.constexpr, FLOOR: tl.constexpr, MODELOPT: tl.constexpr, dtype: tl.constexpr):
    """The biased exponent, int32, of blocks with this amax; `FLOOR` is the binary logarithm of `LARGEST`, rounded down.

    As `mx._exponents` and `mx._scales`, in fp32 bits: of a bf16 they are its own.
    """
    if MODELOPT:  # the next power of two; 2^-127 is subnormal
        bits = tl.div_rn(amax, LARGEST).to(tl.int32, bitcast=True)
        beyond = (bits & 0x7FFFFF) > tl.where(bits < 0x800000, 0x400000, 0)
        exponent = tl.minimum((bits >> 23) + beyond.to(tl.int32), 254)
    else:
        power = (amax.to(tl.int32, bitcast=True) + 0x200000) >> 23  # up from 1.75
        if dtype == tl.float16:  # whose subnormals, not those of fp32, count as zero, but for those rounded up
            power = tl.where(amax < 0.00006103515625, tl.where(amax < 0.0000457763671875, 0, 113), power)
        exponent = tl.where(power == 0, 0, tl.minimum(tl.maximum(power - FLOOR, 0), 254))
        if dtype == tl.float16:  # a step below 2^-24 is zero in fp16, which compressed-tensors replaces by 1
            exponent = tl.where(exponent < 127 - 24, 127, exponent)
    return exponent


@triton.jit
def power_of_two(exponent):
    """fp32 of a biased exponent; 0 is 2^-127, which is subnormal."""
    return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _half(value, high, low):
    """Half the quotient's magnitude by a reciprocal in two parts."""
    magnitude = tl.abs(value)
    return tl.fma(magnitude, high[:, None], magnitude * low[:, None])


@triton.jit
def _eight_exactly(even, odd, step):
    """As `_eight`, by an IEEE division. A quotient that rounds to zero has no sign."""
    even, odd = tl.div_rn(even, step[:, None]), tl.div_rn(odd, step[:, None])
    return _eight(tl.abs(even) * 0.5, even < 0, tl.abs(odd) * 0.5, odd < 0)


@triton.jit
def _eight_by_powers(even, odd, half, zero):
    """As `_eight`: dividing by a power of two is multiplying by another; up to `zero` a quotient rounds to zero."""
    half, zero = half[:, None], zero[:, None]
    return _eight(tl.abs(even) * half, even < -zero, tl.abs(odd) * half, odd < -zero)


@triton.jit
def _pair(low, high):
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _eight(even, even_negative, odd, odd_negative):
    """Four even and four odd columns as eight nibbles of an int32."""
    byte = _code(even, even_negative) + (_code(odd, odd_negative) << 4)
    return tl.sum(byte << (8 * tl.arange(0, 4))[None, :], axis=1)


@triton.jit
def _code(half, negative):
    """E2M1 codes, int32, of half the quotients' magnitudes and whether they are negative.

    The floats that are added have steps of 1/4, 1/2 and 1; the bits of their sum, less their own, count the steps.
    """
    low = tl.clamp(half, 0.0, 1.0) + tl.where(negative, 2097154.0, 2097152.0)  # eight steps more: the sign
    middle = tl.clamp(half - 1.0, 0.0, 1.0) + 4194304.0
    high = tl.clamp(half - 2.0, 0.0, 1.0) + 8388608.0
    steps = low.to(tl.int32, bitcast=True) + middle.to(tl.int32, bitcast=True) + high.to(tl.int32, bitcast=True)
    return steps + 0x20800000
