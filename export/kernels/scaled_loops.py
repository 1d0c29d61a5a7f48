"""The loops of `scaled` for bf16 weights on a CPU; numba compiles this file at first use.

They are written so that LLVM vectorizes each inner loop: one row of one block at a time, no branch on a value, fp32 and
its bits in 32-bit lanes. A bf16 is the upper half of an fp32, so widening it is a shift.
"""

from typing import Any

import numpy as np
from numba import njit

from amaxbridge.export.kernels.e2m1_loops import OPTIONS, to_bf16

_U32 = np.uint32


@njit(**OPTIONS)
def extremes(bits: Any, height: Any, width: Any, low: Any, high: Any) -> None:
    """The minimum and maximum of each block, 0 included.

    The comparison is on integers that have the order of the floats: all bits of a negative number but its sign flipped.

    Args:
        bits: int16 `[rows, columns]`, the weight's bf16.
        height, width: of a block; blocks at the edges may be smaller.
        low, high: int16 zeros `[blocks down, blocks across]`, written: bf16.
    """
    rows, columns = bits.shape
    for row in range(rows):
        for block in range(low.shape[1]):
            source = bits[row, block * width : min(columns, (block + 1) * width)]
            least, greatest = np.int16(0), np.int16(0)
            for i in range(source.size):
                key = _ordered(source[i])
                least, greatest = min(least, key), max(greatest, key)
            down = row // height
            low[down, block] = min(low[down, block], least)
            high[down, block] = max(high[down, block], greatest)
    for down in range(low.shape[0]):
        for block in range(low.shape[1]):
            low[down, block] = _ordered(low[down, block])


@njit(**OPTIONS)
def encode_e4m3(bits: Any, factors: Any, divide: Any, height: Any, width: Any, codes: Any) -> None:
    """E4M3 codes of a weight, saturating at 448.

    Args:
        bits: uint16 `[rows, columns]`.
        factors: fp32 `[blocks down, blocks across]`.
        divide: True to divide values by their factor and round to bf16, False to multiply in fp32.
        height, width: of a block.
        codes: uint8 `[rows, columns]`, written.
    """
    rows, columns = bits.shape
    for row in range(rows):
        for block in range(factors.shape[1]):
            begin, end = block * width, min(columns, (block + 1) * width)
            source, target, factor = bits[row, begin:end], codes[row, begin:end], factors[row // height, block]
            for i in range(source.size):
                scaled = np.float32(_scaled(source[i], factor, divide)).view(np.uint32)
                target[i] = np.uint8(_e4m3(_U32(scaled & _U32(0x7FFFFFFF))) | ((scaled >> _U32(24)) & _U32(0x80)))


@njit(**OPTIONS)
def encode_integers(
    bits: Any, factors: Any, zeros: Any, divide: Any, height: Any, width: Any, least: Any, codes: Any
) -> None:
    """Integer codes of a weight: nearest, ties to even, saturating at `least` and `-least - 1`.

    Args:
        bits, factors, divide, height, width: as in `encode_e4m3`.
        zeros: fp32 `[blocks down, blocks across]`, zero points, added after the division.
        least: fp32, -128 or -8.
        codes: int8 `[rows, columns]`, written.
    """
    rows, columns = bits.shape
    for row in range(rows):
        for block in range(factors.shape[1]):
            begin, end = block * width, min(columns, (block + 1) * width)
            source, target, factor = bits[row, begin:end], codes[row, begin:end], factors[row // height, block]
            zero = zeros[row // height, block]
            for i in range(source.size):
                scaled = _scaled(source[i], factor, divide)
                if divide:
                    scaled = to_bf16(scaled + zero)
                scaled = min(max(scaled, least), -least - np.float32(1.0))
                # fp32 numbers this large are integers, so the addition rounds, and its low bits are the code.
                target[i] = np.int8(np.float32(scaled + np.float32(3 << 22)).view(np.uint32) & _U32(0xFF))


@njit(**OPTIONS)
def pack_nibbles(codes: Any, packed: Any) -> None:
    """Packs codes -8 to 7, offset by 8, two a byte, the first in the low nibble: int8 `[n]` to uint8 `[n / 2]`."""
    eight, four = np.int8(8), np.uint8(4)
    for i in range(packed.size):
        low, high = np.uint8(codes[2 * i] + eight), np.uint8(codes[2 * i + 1] + eight)
        packed[i] = np.uint8(low | np.uint8(high << four))


@njit(**OPTIONS)
def _ordered(bits: Any) -> Any:
    return np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))


@njit(**OPTIONS)
def _scaled(bits: Any, factor: Any, divide: Any) -> Any:
    value = _U32(_U32(bits) << _U32(16)).view(np.float32)
    return to_bf16(value / factor) if divide else np.float32(value * factor)


@njit(**OPTIONS)
def _e4m3(magnitude: Any) -> Any:
    """The E4M3 of a magnitude given as fp32 bits: exponent and three more bits, or steps of 2^-9 if subnormal."""
    magnitude = _U32(min(magnitude, _U32(0x43E00000)))  # 448
    rounded = _U32(magnitude + _U32(0x7FFFF) + ((magnitude >> _U32(20)) & _U32(1)))
    normal = _U32((rounded >> _U32(20)) - _U32((127 - 7) << 3))
    in_steps = np.float32(magnitude.view(np.float32) + np.float32(1 << 14))  # whose own step is 2^-9
    subnormal = _U32(in_steps.view(np.uint32) - _U32(0x46800000))
    return subnormal if magnitude < _U32(0x3C800000) else normal  # 2^-6
