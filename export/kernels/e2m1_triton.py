"""NVFP4 and MXFP4 on a GPU: block scales, codes and packing in one pass, the bytes of `nvfp4` and `mx`.

A weight of 16 bits is 2 bytes in and 0.56 out for an element, so at 3 TB/s an H100 has time for about 110 instructions
of a lane for four elements. Where they go:

- **Division.** An IEEE division is 10 instructions and two slow ones an element. The elements of a block share
  their divisor, so its reciprocal is made once, as the sum of two floats, `high + low`, and a quotient is
  `fma(x, high, x * low)`: right to 2^-47 before its only rounding. That is not always the IEEE quotient, but it falls
  on the same side of each bound between codes, for every bf16 and fp16: the exact quotient of a significand of 11 bits
  lies on the bound, or further from where fp32 rounds to it than 2^-47. The one exception, a divisor of all ones, is
  why `low` has its second term. `tests/test_triton.py` proves it again on numbers. fp32 weights have no such gap, nor
  do divisors outside of fp32's middle: they take `div_rn`.
- **Rounding.** E2M1 is three ranges of even steps: 1/2 up to 2, 1 up to 4, 2 up to 6. So a code is the sum of three
  rounded numbers: of the part of the quotient that lies in each range, clamped to it (free on most instructions)
  and added to a float whose own step it is. Ties go to even in each, and so in E2M1. This is 7 instructions, six
  of them floating point, of which the GPU does twice as many as of integer ones. The way of the CPU, seven comparisons
  with integer bounds from tables, is 14 on the slow side, and its tables cost a dozen launches a group.
- **Scales.** About 30 instructions a block of 16, without tables.

A thread takes a whole block of NVFP4: two reads of 16 bytes, a write of 8, no exchange with its neighbours.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from export.kernels.floats_triton import (
    amax_of,
    from_e4m3,
    halves,
    larger,
    on,
    options,
    report,
    rounded,
    to_bf16,
    to_e4m3,
    words,
)

_WARPS = 4


def quantize_nvfp4(
    weight: Tensor, *, modelopt: bool, amax: float, divisor: float, factor_2: float, block_amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 `[out, in/2]`, scales E4M3 `[out, in/16]` and a flag that is 1 if the weight is not finite.

    Args:
        weight: bf16, fp16 or fp32 `[out, in]`, in divisible by 16.
        modelopt: which arithmetic, see `nvfp4.Arithmetic`.
        amax, divisor, factor_2: of the fused group; fp32 numbers.
        block_amax: `[out, in/16]`, calibrated.
    """
    rows, columns = weight.shape
    codes, scales, bad = _outputs(weight, 16)
    six = torch.tensor([6.0])
    divisor_of_amax = six * torch.tensor([factor_2]) if block_amax is None else torch.tensor([amax]) / six
    fast = weight.dtype != torch.float32 and block_amax is None and 2.0**-20 <= amax <= 2.0**16
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
                divisor_of_amax.item(),
                factor_2,
                divisor,
                MODELOPT=modelopt,
                STATIC=block_amax is not None,
                FAST=fast and not arguments["INTERPRETED"],
                N=threads,
                num_warps=_WARPS,
                **arguments,
            )
    return codes, scales.view(torch.float8_e4m3fn), bad


def quantize_mxfp4(weight: Tensor, *, modelopt: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 `[out, in/2]`, exponents uint8 `[out, in/32]` and a flag, as `quantize_nvfp4`."""
    codes, scales, bad = _outputs(weight, 32)
    blocks, tile = scales.numel(), 64
    if blocks:
        with on(weight.device):
            _mxfp4[(triton.cdiv(blocks, tile),)](
                words(weight),
                codes.view(-1).view(torch.int32),
                scales,
                bad,
                blocks,
                MODELOPT=modelopt,
                N=tile,
                num_warps=_WARPS,
                **options(weight),
            )
    return codes, scales, bad


def _outputs(weight: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // width, dtype=torch.uint8, device=weight.device)
    return codes, scales, torch.zeros(1, dtype=torch.int32, device=weight.device)


@triton.jit
def _nvfp4(
    words: Any,
    codes: Any,
    scales: Any,
    block_amax: Any,
    bad: Any,
    blocks: Any,
    divisor_of_amax: Any,
    factor_2: Any,
    divisor: Any,
    MODELOPT: tl.constexpr,
    STATIC: tl.constexpr,
    FAST: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    N: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = block < blocks
    at = (block * 8)[:, None] + tl.arange(0, 4)[None, :]
    even, odd = halves(tl.load(words + at, mask=inside[:, None], other=0), DTYPE)
    even_2, odd_2 = halves(tl.load(words + at + 4, mask=inside[:, None], other=0), DTYPE)
    amax = larger(amax_of(even, odd), amax_of(even_2, odd_2))
    report(bad, amax, inside)

    if STATIC:
        scale = tl.div_rn(tl.load(block_amax + block, mask=inside, other=1.0), 6.0)
        scale = tl.div_rn(tl.where(scale == 0.0, 1.0, scale) * 448.0, divisor_of_amax)
        code = to_e4m3(tl.clamp(scale, 0.001953125, 448.0), INTERPRETED)
    elif MODELOPT:
        scale = tl.div_rn(amax, divisor_of_amax)
        code = to_e4m3(tl.clamp(tl.where(scale == 0.0, 1.0, scale), 0.001953125, 448.0), INTERPRETED)
    else:
        scale = tl.div_rn(amax, 6.0)
        if DTYPE == tl.bfloat16:
            scale = to_bf16(scale)
        code = to_e4m3(tl.minimum(scale * divisor, 448.0), INTERPRETED)
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
    both = (word_2.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
    tl.store(codes + block, both, mask=inside)


@triton.jit
def _mxfp4(
    words: Any,
    codes: Any,
    scales: Any,
    bad: Any,
    blocks: Any,
    MODELOPT: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    N: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = block < blocks
    at = (block * 16)[:, None] + tl.arange(0, 16)[None, :]
    even, odd = halves(tl.load(words + at, mask=inside[:, None], other=0), DTYPE)
    amax = amax_of(even, odd)
    report(bad, amax, inside)
    exponent = mx_exponent(amax, 6.0, 2, MODELOPT, DTYPE)
    tl.store(scales + block, exponent.to(tl.uint8), mask=inside)

    # Dividing by a power of two is multiplying by another. A quotient that rounds to zero has no sign.
    half = (power_of_two(254 - exponent) * 0.5)[:, None]
    zero = power_of_two(exponent)[:, None]
    if MODELOPT or DTYPE == tl.float32:
        zero = zero * 2.0**-75 * 2.0**-75
    elif DTYPE == tl.bfloat16:
        zero = zero * 2.0**-67 * 2.0**-67
    else:
        zero = zero * 2.0**-25
    even_codes = _code(tl.abs(even) * half, even < -zero)
    odd_codes = _code(tl.abs(odd) * half, odd < -zero)
    byte = tl.reshape(even_codes | (odd_codes << 4), (N * 4, 4))
    word = tl.sum(byte << (8 * tl.arange(0, 4))[None, :], axis=1)
    first = tl.program_id(0).to(tl.int64) * (N * 4) + tl.arange(0, N * 4)
    tl.store(codes + first, word, mask=first < blocks * 4)


@triton.jit
def mx_exponent(amax: Any, LARGEST: tl.constexpr, FLOOR: tl.constexpr, MODELOPT: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """The biased exponent, int32, of blocks with this amax; `FLOOR` is the binary logarithm of `LARGEST`, rounded down.

    As `mx._exponents` and `mx._scales`, in fp32 bits: of a bf16 they are its own.
    """
    if MODELOPT:  # the next power of two; 2^-127 is subnormal
        bits = tl.div_rn(amax, LARGEST).to(tl.int32, bitcast=True)
        fraction = bits & 0x7FFFFF
        return tl.minimum((bits >> 23) + (fraction > tl.where(bits < 0x800000, 0x400000, 0)).to(tl.int32), 254)
    power = (amax.to(tl.int32, bitcast=True) + 0x200000) >> 23  # up from 1.75
    if DTYPE == tl.float16:  # whose subnormals are numbers like others in fp32, and count as zero; up from 1.5 here
        power = tl.where(amax < 0.00006103515625, tl.where(amax < 0.0000457763671875, 0, 113), power)
    exponent = tl.where(power == 0, 0, tl.minimum(tl.maximum(power - FLOOR, 0), 254))
    if DTYPE == tl.float16:  # a step below 2^-24 is zero in fp16, which compressed-tensors replaces by 1
        exponent = tl.where(exponent < 127 - 24, 127, exponent)
    return exponent


@triton.jit
def power_of_two(exponent: Any) -> Any:
    """fp32 of a biased exponent; 0 is 2^-127, which is subnormal."""
    return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _half(value: Any, high: Any, low: Any) -> Any:
    """Half the quotient's magnitude by a reciprocal in two parts."""
    magnitude = tl.abs(value)
    return tl.fma(magnitude, high[:, None], magnitude * low[:, None])


@triton.jit
def _eight_exactly(even: Any, odd: Any, step: Any) -> Any:
    """As `_eight`, by an IEEE division. A quotient that rounds to zero has no sign."""
    even, odd = tl.div_rn(even, step[:, None]), tl.div_rn(odd, step[:, None])
    return _eight(tl.abs(even) * 0.5, even < 0, tl.abs(odd) * 0.5, odd < 0)


@triton.jit
def _eight(even: Any, even_negative: Any, odd: Any, odd_negative: Any) -> Any:
    """Four even and four odd columns as eight nibbles of an int32."""
    byte = _code(even, even_negative) | (_code(odd, odd_negative) << 4)
    return tl.sum(byte << (8 * tl.arange(0, 4))[None, :], axis=1)


@triton.jit
def _code(half: Any, negative: Any) -> Any:
    """E2M1 codes, int32, of half the quotients' magnitudes and whether they are negative.

    The floats that are added have steps of 1/4, 1/2 and 1; the bits of their sum, less their own, count the steps.
    """
    low = tl.minimum(half, 1.0) + 2097152.0
    middle = tl.clamp(half - 1.0, 0.0, 1.0) + 4194304.0
    high = tl.clamp(half - 2.0, 0.0, 1.0) + 8388608.0
    steps = low.to(tl.int32, bitcast=True) + middle.to(tl.int32, bitcast=True) + high.to(tl.int32, bitcast=True)
    return steps + 0x20800000 + tl.where(negative, 8, 0)
