"""Codes times scales: FP8 (E4M3), INT8 and packed INT4, with a scale for a tensor, a row, a group or a block.

    weight = (code - zero_point) * scale

As for NVFP4, two programs define the bytes. Without a calibrated amax, llm-compressor's ``model_free_ptq`` does: scales
come from the weight itself, every step is rounded in the weight's dtype, and scales are stored in that dtype. With an
amax, ModelOpt's fake quantizer does, in fp32 throughout: ``code = round(weight * (bound / amax))``, for E4M3 with ``1 /
amax`` rounded before ``* bound``; scales are ``amax / bound`` in fp32.

As in `nvfp4`, divisors are tensors on the weight's device, so that a division stays a division. bf16 weights on a CPU
take the loops of `scaled_loops`, and E4M3 on a GPU takes the kernels of `e4m3_triton`; both make the same bytes.
"""

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.compiled import Loop
from amaxbridge.export.kernels.e2m1 import NOT_FINITE, check_finite, fits_loops, fits_triton

_extremes, _pack_nibbles = Loop("scaled_loops", "extremes"), Loop("scaled_loops", "pack_nibbles")
_encode_e4m3, _encode_integers = Loop("scaled_loops", "encode_e4m3"), Loop("scaled_loops", "encode_integers")


class Code(Enum):
    """The type of a weight's codes: ModelOpt's largest code, and half of compressed-tensors' range."""

    E4M3 = (448.0, 448.0)
    INT8 = (127.0, 127.5)
    INT4 = (7.0, 7.5)

    @property
    def bound(self) -> float:
        return self.value[0]

    @property
    def half_range(self) -> float:
        return self.value[1]

    @property
    def least(self) -> float:
        """The smallest code."""
        return -448.0 if self is Code.E4M3 else -self.bound - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self is Code.E4M3 else torch.int8


@dataclass(frozen=True, slots=True)
class Blocks:
    """The block that shares one scale: rows and columns, None for all of them. Blocks at the edges may be smaller."""

    height: int | None = 1
    width: int | None = None

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The number of blocks, down and across."""
        return math.ceil(rows / (self.height or rows or 1)), math.ceil(columns / (self.width or columns or 1))

    def size(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of a block of this weight."""
        return self.height or len(weight), self.width or weight.shape[1]

    def spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Scales `[blocks down, blocks across]` for every element of a weight `[out, in]`."""
        height, width = self.size(weight)
        rows = scale.repeat_interleave(height, 0)[: len(weight)] if height > 1 else scale
        return rows.repeat_interleave(width, 1)[:, : weight.shape[1]]


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """Codes `[out, in]` (E4M3, or int8 for both integers), scales and zero points `[blocks down, blocks across]`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


def quantize(
    weight: Tensor, code: Code, blocks: Blocks, *, amax: Tensor | None = None, symmetric: bool = True
) -> ScaledWeight:
    """Quantizes a weight `[out, in]`.

    Args:
        weight: bf16, fp16 or fp32.
        code: the type of the codes.
        blocks: the block that shares one scale.
        amax: fp32 `[blocks down, blocks across]`, calibrated; None to take it from the weight.
        symmetric: False for zero points, which need `amax=None`.

    Raises:
        ValueError: the weight or the amax holds NaN or Inf, or an amax is negative.
    """
    if amax is None:
        high = largest(weight, blocks) if symmetric else None
        low, high = extremes(weight, blocks) if high is None else (-high, high)
        scale, zero_point = _compressed_tensors_scale(low, high, code, symmetric)
        return ScaledWeight(encode(weight, code, blocks, scale, zero_point), scale, zero_point)
    if not _in_triton(weight, code, blocks):
        extremes(weight, blocks)  # raises if the weight is not finite
    if not (amax.isfinite() & (amax >= 0)).all():
        raise ValueError("a calibrated amax is negative, NaN or Inf")
    amax = amax.to(weight.device, torch.float32)
    bound = torch.full_like(amax, code.bound)
    amax = usable(amax, bound)
    # torch computes ModelOpt's 448.0 / amax as amax.reciprocal() * 448.0; its bound of integers is a tensor, divided.
    factor = amax.reciprocal() * bound if code is Code.E4M3 else bound / amax
    return ScaledWeight(_encode(weight, code, blocks, factor, None, Arithmetic.MODELOPT), amax / bound)


def scale_of(amax: Tensor, code: Code) -> Tensor:
    """The scales that `quantize` stores for calibrated amax, fp32."""
    bound = torch.full_like(amax, code.bound, dtype=torch.float32)
    return usable(amax.float(), bound) / bound


def amax_of_power_of_two(amax: Tensor, code: Code) -> Tensor:
    """The least `bound · 2^k` that is no less than each amax, fp32: its scale is exactly 2^k. 0, NaN and Inf stay.

    Under such a scale a code is the weight times a power of two, rounded once.
    """
    amax = amax.float()
    (mantissa, exponent), (of_bound, shift) = torch.frexp(amax), math.frexp(code.bound)
    power = exponent - shift + (mantissa > of_bound)
    return torch.ldexp(torch.full_like(amax, code.bound), power).where((amax > 0) & amax.isfinite(), amax)


def usable(amax: Tensor, bound: Tensor) -> Tensor:
    """Replaces every amax that makes no factor by `bound`, so that the scale is 1 and the codes are zero.

    That is every zero, as in ModelOpt's exporter, and every amax so small that `bound / amax` is infinite.
    """
    return amax.where((amax.reciprocal() * bound).isfinite(), bound)


def dequantize(weight: ScaledWeight, blocks: Blocks, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`(code - zero_point) * scale`, `[out, in]`, computed in fp32 and cast to `dtype`."""
    codes = weight.codes.float()
    if weight.zero_point is not None:
        codes -= blocks.spread(weight.zero_point.float(), codes)
    return (codes * blocks.spread(weight.scale.float(), codes)).to(dtype)


def encode(weight: Tensor, code: Code, blocks: Blocks, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """The codes `[out, in]` under given scales, in compressed-tensors' arithmetic: in the weight's dtype."""
    return _encode(weight, code, blocks, scale, zero_point, Arithmetic.COMPRESSED_TENSORS)


def extremes(weight: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The minimum and maximum of each block, 0 included: `[blocks down, blocks across]`, in the weight's dtype.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    shape = blocks.shape(*weight.shape)
    height, width = blocks.size(weight)
    if fits_loops(weight):
        low, high = torch.zeros(2, *shape, dtype=torch.int16)
        bits = weight.contiguous().view(torch.int16).numpy()
        _extremes(bits, height, width, low.numpy(), high.numpy())
        low, high = low.view(weight.dtype), high.view(weight.dtype)
    else:
        missing = (0, shape[1] * width - weight.shape[1], 0, shape[0] * height - weight.shape[0])
        padded = torch.nn.functional.pad(weight, missing) if any(missing) else weight
        parts = padded.reshape(shape[0], height, shape[1], width)
        low, high = parts.amin((1, 3)).clamp(max=0), parts.amax((1, 3)).clamp(min=0)
    if not (low.isfinite() & high.isfinite()).all():
        raise ValueError(NOT_FINITE)
    return low, high


def largest(weight: Tensor, blocks: Blocks) -> Tensor:
    """The amax of each block, `[blocks down, blocks across]`, in the weight's dtype.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    if _in_triton(weight, Code.E4M3, blocks):
        from amaxbridge.export.kernels import e4m3_triton

        found = e4m3_triton.largest(weight, *blocks.size(weight), blocks.shape(*weight.shape))
        if not found.isfinite().all():
            raise ValueError(NOT_FINITE)
        return found.to(weight.dtype)
    low, high = extremes(weight, blocks)
    return torch.maximum(low.abs(), high)


def _compressed_tensors_scale(low: Tensor, high: Tensor, code: Code, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as compressed-tensors' ``calculate_qparams``, in the weight's dtype."""
    zero_point = None
    if symmetric:
        scale = torch.maximum(low.abs(), high) / torch.full_like(low, code.half_range)
    else:
        scale = (high - low) / torch.full_like(low, 2 * code.half_range)
        zero_point = (code.least - low / scale).nan_to_num(0.0).clamp(code.least, code.bound).round().to(torch.int8)
    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps), zero_point


def _encode(
    weight: Tensor, code: Code, blocks: Blocks, factor: Tensor, zero_point: Tensor | None, arithmetic: Arithmetic
) -> Tensor:
    if fits_loops(weight):
        return _encode_in_loops(weight, code, blocks, factor, zero_point, arithmetic)
    if _in_triton(weight, code, blocks):
        from amaxbridge.export.kernels import e4m3_triton

        codes, bad = e4m3_triton.encode(weight, factor, *blocks.size(weight), arithmetic)
        check_finite(bad)
        return codes
    spread = blocks.spread(factor, weight)
    scaled = weight.float() * spread if arithmetic is Arithmetic.MODELOPT else weight / spread
    if zero_point is not None:
        scaled += blocks.spread(zero_point.to(scaled.dtype), weight)
    scaled = scaled.clamp(code.least, code.bound)
    return (scaled if code is Code.E4M3 else scaled.round()).to(code.dtype)


def _in_triton(weight: Tensor, code: Code, blocks: Blocks) -> bool:
    if code is not Code.E4M3 or not fits_triton(weight):
        return False
    from amaxbridge.export.kernels import e4m3_triton

    return e4m3_triton.fits(weight, blocks.size(weight)[1])


def _encode_in_loops(
    weight: Tensor, code: Code, blocks: Blocks, factor: Tensor, zero_point: Tensor | None, arithmetic: Arithmetic
) -> Tensor:
    codes, divide = torch.empty(weight.shape, dtype=code.dtype), arithmetic is Arithmetic.COMPRESSED_TENSORS
    bits, factors = weight.contiguous().view(torch.uint16).numpy(), factor.float().numpy()
    if code is Code.E4M3:
        _encode_e4m3(bits, factors, divide, *blocks.size(weight), codes.view(torch.uint8).numpy())
    else:
        zeros = (torch.zeros_like(factor) if zero_point is None else zero_point).float().numpy()
        least = np.float32(code.least)
        _encode_integers(bits, factors, zeros, divide, *blocks.size(weight), least, codes.numpy())
    return codes


def pack_int4(codes: Tensor) -> Tensor:
    """Packs codes -8 to 7, int8 `[rows, columns]`, into int32 `[rows, columns/8]`: eight a word, the first in the low
    bits.

    For zero points use `pack_int4(zero_point.T).T`. Missing columns are filled with zero bits.
    """
    if codes.shape[1] % 8:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8), value=-8)
    if codes.device.type == "cpu":
        packed = torch.empty(codes.numel() // 2, dtype=torch.uint8)
        _pack_nibbles(codes.flatten().numpy(), packed.numpy())
    else:
        pairs = (codes + 8).flatten().view(torch.int16)
        packed = (pairs | (pairs >> 4)).to(torch.uint8)  # the pair 0x0b0a becomes the byte 0xba
    return packed.view(torch.int32).reshape(len(codes), -1)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Unpacks words int32 `[rows, columns/8]` into codes int8 `[rows, columns]`."""
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)[:, :columns]
    return nibbles.view(torch.int8) - 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 `[rows, columns]` of 4 or 8 bits as int32 words along the columns, offset to be unsigned.

    The first code is in the low bits; the last word is filled up with zero bits.
    """
    if bits == 4:
        return pack_int4(codes)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4), value=-128)
    return (codes.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Codes int8 `[rows, columns]` of words int32 that hold 4 or 8 bits each."""
    if bits == 4:
        return unpack_int4(packed, columns)
    return (packed.contiguous().view(torch.uint8)[:, :columns] ^ 0x80).view(torch.int8)
