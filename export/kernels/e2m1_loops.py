"""E2M1 codes of bf16 weights on a CPU, by integer comparisons alone; numba compiles this file at first use.

Under one scale, the code of a value is a step function of the bits of its magnitude. So the bits of a block's amax
index the scale byte (`scale_of`), the scale byte indexes the eight magnitudes at which the code changes (`bounds`), and
the code is the number of bounds that a magnitude exceeds. No element needs floating point.

The step for one block is written directly in LLVM IR, as one vector: an AVX2 register holds 16 bf16, and other
    processors
use what they have. Written as a loop over elements, LLVM vectorizes only a part of it, and it is four times slower.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)  # between neighbouring E2M1 values
_BF16_INFINITY = 0x7F80

OPTIONS = {"error_model": "numpy", "_nrt": False}  # neither Python's errors nor its allocator: see `compiled`


@njit(**OPTIONS)
def largest_magnitude(bits: Any) -> Any:
    """The bits of the largest magnitude of a bf16 weight, uint16 `[n]`; above 0x7F7F it is not finite."""
    largest = np.uint16(0)
    for i in range(bits.size):
        largest = max(largest, np.uint16(bits[i] & np.uint16(0x7FFF)))
    return largest


@njit(**OPTIONS)
def quantize_blocks(bits: Any, width: Any, scale_of: Any, bounds: Any, codes: Any, scales: Any) -> Any:
    """Quantizes every block of a weight; returns the bits of its largest magnitude, above 0x7F7F if it is not finite.

    Args:
        bits: uint16 `[blocks, width]`, the weight's bf16.
        width: 16 or 32.
        scale_of: uint8 `[32768]`, the scale byte for each possible amax of a block.
        bounds: uint16 `[256, 8]`, the bounds of the codes under each scale byte; see `code_bounds`.
        codes: uint8 `[blocks, width / 2]`, written: two codes a byte, the even column in the low nibble.
        scales: uint8 `[blocks]`, written.
    """
    largest = np.uint16(0)
    for block in range(scales.size):
        if width == 16:
            amax = _quantize_block(16, bits, block, scale_of, bounds, codes, scales)
        else:
            amax = _quantize_block(32, bits, block, scale_of, bounds, codes, scales)
        largest = max(largest, amax)
    return largest


@njit(**OPTIONS)
def code_bounds(steps: Any, round_quotient: Any, bounds: Any) -> None:
    """For each step, the greatest magnitudes (bf16 bits) below codes 1 to 7, and the greatest that divides to zero.

    Args:
        steps: fp32 `[n]`, the value of code 1.0. NaN makes every code 0.
        round_quotient: True if `value / step` is rounded to bf16 before the comparison.
        bounds: uint16 `[n, 8]`, written.
    """
    for row in range(steps.size):
        step = steps[row]
        if np.isnan(step):
            for k in range(8):
                bounds[row, k] = 0x7FFF
            continue
        for k in range(8):
            guess = _MIDPOINTS[k] * step if k < 7 else np.float32(0.0)
            bound: Any = min(np.int64(np.float32(guess).view(np.uint32)) >> 16, _BF16_INFINITY)
            while bound > 0 and _reaches(bound, step, k, round_quotient):
                bound -= 1
            while bound < _BF16_INFINITY and not _reaches(bound + 1, step, k, round_quotient):
                bound += 1
            bounds[row, k] = bound


@njit(**OPTIONS)
def _reaches(magnitude: Any, step: Any, k: Any, round_quotient: Any) -> Any:
    """True if a magnitude reaches code `k + 1`, ties to even; for `k` = 7, if its quotient is not zero."""
    quotient = np.uint32(magnitude << 16).view(np.float32) / step
    if round_quotient:
        quotient = to_bf16(quotient)
    if k == 7:
        return quotient > 0
    return quotient >= _MIDPOINTS[k] if k % 2 else quotient > _MIDPOINTS[k]


@njit(**OPTIONS)
def to_bf16(value: Any) -> Any:
    """An fp32 rounded to the nearest bf16, ties to even; not for NaN."""
    bits = np.float32(value).view(np.uint32)
    bits = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)


@intrinsic(prefer_literal=True)
def _quantize_block(
    _: Any, width: Any, bits: Any, block: Any, scale_of: Any, bounds: Any, codes: Any, scales: Any
) -> Any:
    """Quantizes block number `block` of `width` values; returns its amax as bits."""
    signature = types.uint16(width, bits, block, scale_of, bounds, codes, scales)
    return signature, _block_in_llvm


def _block_in_llvm(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    lanes = signature.args[0].literal_value
    vector = ir.VectorType(_I16, lanes)
    block = arguments[2]
    source, scale_table, bound_table, codes, scales = (
        context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (1, 3, 4, 5, 6)
    )

    def splat(value: Any) -> Any:
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
        return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))

    def ones(mask: Any) -> Any:
        return builder.sext(mask, vector)  # every bit where true, so -1

    pointer = builder.gep(source, [builder.mul(block, _I64(lanes))])
    values = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=2)
    magnitudes = builder.and_(values, splat(_I16(0x7FFF)))
    reduction = ir.FunctionType(_I16, [vector])
    largest = cgutils.get_or_insert_function(builder.module, reduction, f"llvm.vector.reduce.umax.v{lanes}i16")
    amax = builder.call(largest, [magnitudes])
    scale = builder.load(builder.gep(scale_table, [builder.zext(amax, _I64)]))
    builder.store(scale, builder.gep(scales, [block]))

    row = builder.gep(bound_table, [builder.mul(builder.zext(scale, _I64), _I64(8))])
    bound = [splat(builder.load(builder.gep(row, [_I64(k)]))) for k in range(8)]
    negative = builder.icmp_unsigned(">", values, builder.or_(bound[7], splat(_I16(0x8000))))
    code = builder.and_(ones(negative), splat(_I16(8)))
    for k in range(7):
        code = builder.sub(code, ones(builder.icmp_signed(">", magnitudes, bound[k])))

    pairs = builder.bitcast(code, ir.VectorType(_I32, lanes // 2))
    twelve = ir.Constant(pairs.type, [12] * (lanes // 2))
    packed = builder.trunc(builder.or_(pairs, builder.lshr(pairs, twelve)), ir.VectorType(_I8, lanes // 2))
    pointer = builder.gep(codes, [builder.mul(block, _I64(lanes // 2))])
    builder.store(packed, builder.bitcast(pointer, packed.type.as_pointer()), align=1)
    return amax
