"""The MX formats: blocks of 32 columns under a power of two, stored as its exponent (E8M0, uint8, bias 127).

    weight = code * 2 ** (scale - 127)          codes E2M1 (MXFP4) or E4M3 (MXFP8)

The two arithmetics choose the exponent differently. compressed-tensors first rounds the block's amax to a power of two,
upwards from a mantissa of 1.75 (which E2M1 would round up, too), so a few values may saturate. ModelOpt takes the
smallest exponent under which none does. Both round to the nearest code, ties to even.
"""

import math
from functools import cache

import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Blocks, Code, encode, largest

BLOCK = 32
_BLOCKS = Blocks(width=BLOCK)
_FLOATS = {torch.bfloat16: (7, 127), torch.float16: (10, 15), torch.float32: (23, 127)}  # bits of mantissa, bias
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0


def quantize_mxfp4(weight: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 `[out, in/2]` and exponents uint8 `[out, in/32]` of a weight `[out, in]`.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    if e2m1.fits_loops(weight):
        return e2m1.quantize_by_tables(weight, BLOCK, _tables(arithmetic))
    if e2m1.fits_triton(weight):
        from amaxbridge.export.kernels import e2m1_triton

        codes, exponents, bad = e2m1_triton.quantize_mxfp4(weight, arithmetic)
        e2m1.check_finite(bad)
        return codes, exponents
    exponents, steps = _scales(weight, _E2M1_MAX, arithmetic)
    scaled = weight / _BLOCKS.spread(steps, weight)
    return e2m1.pack(e2m1.round_to_codes(scaled)), exponents


def quantize_mxfp8(weight: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Codes E4M3 `[out, in]` and exponents uint8 `[out, in/32]` of a weight `[out, in]`.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    if e2m1.fits_triton(weight):
        from amaxbridge.export.kernels import e4m3_triton

        codes, exponents, bad = e4m3_triton.quantize_mxfp8(weight, arithmetic)
        e2m1.check_finite(bad)
        return codes, exponents
    exponents, steps = _scales(weight, _E4M3_MAX, arithmetic)
    return encode(weight, Code.E4M3, _BLOCKS, steps), exponents


def dequantize(codes: Tensor, exponents: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`code * 2 ** (exponent - 127)` of codes `[out, in]`, in `dtype`."""
    codes = codes.float()
    return (codes * _BLOCKS.spread(power_of_two(exponents), codes)).to(dtype)


def _scales(weight: Tensor, largest_code: float, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Exponents uint8 `[out, in/32]`, and the powers of two that they stand for."""
    exponents = _exponents(largest(weight, _BLOCKS), largest_code, arithmetic)
    steps = power_of_two(exponents)
    if arithmetic == Arithmetic.MODELOPT:
        return exponents, steps
    steps = steps.to(weight.dtype)  # a small step is zero in fp16; compressed-tensors replaces it by 1
    return exponents.masked_fill(steps == 0, 127), steps.masked_fill(steps == 0, 1.0)


def _exponents(amax: Tensor, largest_code: float, arithmetic: Arithmetic) -> Tensor:
    """Biased exponents of blocks with this amax, given in the weight's dtype. No logarithm: it may be off by one."""
    if arithmetic == Arithmetic.MODELOPT:  # ceil(log2(amax / largest)): MXFP4QTensor, MXFP8QTensor
        amax = amax.float()
        fraction, exponent = (amax / torch.full_like(amax, largest_code)).frexp()
        exponent = exponent - (fraction == 0.5).int()
    else:  # compressed-tensors' generate_mx_scales
        mantissa, bias = _FLOATS[amax.dtype]
        bits = amax.view({2: torch.int16, 4: torch.int32}[amax.itemsize]).int()
        exponent = ((bits + (1 << (mantissa - 2))) >> mantissa) - bias
        amax = amax.masked_fill(exponent == -bias, 0.0)  # subnormal
        exponent = exponent - math.floor(math.log2(largest_code))
    return (exponent.clamp(-127, 127) + 127).masked_fill(amax == 0, 0).to(torch.uint8)


def power_of_two(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) as fp32, built from bits: a power computed on a GPU may be inexact. 2^-127 is subnormal."""
    return (exponents.int() << 23).masked_fill(exponents == 0, 1 << 22).view(torch.float32)


@cache
def _tables(arithmetic: Arithmetic) -> e2m1.Tables:
    scales = _exponents(e2m1.magnitudes(), _E2M1_MAX, arithmetic)
    steps = power_of_two(torch.arange(256, dtype=torch.uint8))
    return e2m1.Tables.of(scales, steps, round_quotient=arithmetic == Arithmetic.COMPRESSED_TENSORS)
