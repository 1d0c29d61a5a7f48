"""What the Triton kernels share: reading two values at a time, rounding, launching.

Weights are read as words of two neighbouring columns, the even one in the low half. So what becomes one byte of codes
is in one lane, and packing needs no exchange between lanes.

Triton's `/` is not IEEE (2 ulp), and its compiler fuses a product and a sum into one rounding. Here a division is
`div_rn`, fusion is off (`launch`), and `fma` stands where one rounding is meant.

Triton's interpreter, in which tests run where there is no GPU, rounds wrongly to bf16 and to E4M3 and does not fuse
an `fma`. Kernels learn of it by the argument `INTERPRETED` and take integers or a division instead.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_INFINITY = tl.constexpr(float("inf"))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def options(weight: Tensor) -> dict[str, Any]:
    """Arguments of every kernel that reads this weight."""
    return {
        "dtype": _DTYPES[weight.dtype],
        "INTERPRETED": bool(triton.knobs.runtime.interpret),
        "enable_fp_fusion": False,
    }


def aligned(weight: Tensor) -> Tensor:
    """The weight, contiguous, at an address that can be read 16 bytes at a time; a copy if need be."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def words(weight: Tensor) -> Tensor:
    """A weight with an even number of columns as words of two columns, flat."""
    return aligned(weight).view(-1).view(torch.int64 if weight.dtype == torch.float32 else torch.int32)


@triton.jit
def halves(word, dtype: tl.constexpr):
    """The two values of words, as fp32: the even column, the odd one."""
    if dtype == tl.bfloat16:
        even, odd = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        even = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        even = word.to(tl.int32).to(tl.float32, bitcast=True)
        odd = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def larger(one, other):
    """The maximum, or NaN if either is one."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax_of(even, odd):
    """The largest magnitude along the second axis; NaN if there is one."""
    return tl.reduce(larger(tl.abs(even), tl.abs(odd)), 1, larger)


@triton.jit
def report(bad, amax, inside):
    """Sets the flag if an amax is NaN or Inf. Nothing is written otherwise."""
    tl.store(bad + tl.zeros_like(inside).to(tl.int32), 1, mask=inside & ~(amax < _INFINITY))


@triton.jit
def to_bf16(value):
    """fp32 rounded to bf16, ties to even; not for NaN."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 rounded to the dtype of the weight, as fp32."""
    return to_bf16(value) if dtype == tl.bfloat16 and INTERPRETED else value.to(dtype).to(tl.float32)


@triton.jit
def to_e4m3(value):
    """The E4M3 of an fp32, nearest, ties to even, saturating at 448; a zero keeps its sign. As bits, int32.

    In integers: Triton 3.6 has the hardware's conversion, and gets it wrong for tensors of two dims.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    in_steps = magnitude.to(tl.float32, bitcast=True) + 16384.0  # whose own step is 2^-9
    subnormal = in_steps.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # below 2^-6
    return code | ((bits >> 24) & 0x80)


@triton.jit
def from_e4m3(code):
    """The fp32 of a positive E4M3, given as bits. Both ranges as integers: the hardware converts by way of fp16."""
    code = code.to(tl.int32)
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
