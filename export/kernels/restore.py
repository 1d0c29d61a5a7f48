"""Restoring a weight from NVFP4 or MX bytes so that quantizing it again makes the same bytes.

Dequantized values alone are not enough: several byte patterns decode to the same value. For NVFP4 in ModelOpt's
arithmetic:

- Nibble 8 is a negative number that rounded to zero; -0.0 would become nibble 0. It is restored as the smallest
  negative number.
- A block of zeros under the smallest scale held small numbers; a block of real zeros would get scale 1. One element is
  restored as the smallest positive number.
- Small blocks have subnormal E4M3 scales, in coarse steps. Under twice the smallest scale, the largest value of a block
  may have rounded to 4, which alone would imply the smallest scale; it lay between 4.5 and 5, and 4.75 is restored.

Every other block that ModelOpt makes holds a 6, which implies its scale. For the MX formats:

- The exponent is the smallest under which the block does not saturate, so its largest value lay above half of the
  largest code. A value that rounded down to that half is restored as a larger one that rounds to it, too.

Each restored number rounds to the same code as the original, so a forward pass that quantizes sees no difference.
"""

import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1, mx
from amaxbridge.export.kernels.nvfp4 import BLOCK, NVFP4Weight

_CHUNK = 1 << 18  # elements at a time, so that they stay in the cache
_TINY = torch.finfo(torch.bfloat16).tiny
_LEAST = 2.0**-9
"""The smallest block scale."""


def restore_nvfp4(weight: NVFP4Weight, factor_2: Tensor) -> Tensor:
    """Returns a bf16 weight `[out, in]` that `nvfp4.quantize`, in ModelOpt's arithmetic, turns into these bytes again.

    One table lookup restores two codes under their scale. The few blocks under the smallest scales are restored
    separately.

    Args:
        weight: the codes and block scales.
        factor_2: `amax / 2688` of the amax that `quantize` will get, fp32.
    """
    rows, columns = weight.packed.shape[0], weight.packed.shape[1] * 2
    every_scale = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(128, BLOCK // 2, 1).transpose(1, 2)
    pairs = _values(every_byte, every_scale[:, None].expand(128, 256), factor_2)[..., :2].bfloat16()
    table = pairs.reshape(-1, 2).view(torch.int32).flatten()  # [scale · 256 + byte]
    restored = torch.empty(rows, columns, dtype=torch.bfloat16)
    step = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        packed = weight.packed[part].unflatten(1, (-1, BLOCK // 2))
        scale = weight.block_scale[part]
        index = (scale.view(torch.uint8).int() << 8).unsqueeze(-1) | packed
        values = table[index].view(torch.bfloat16)
        small = scale.float() <= 2 * _LEAST
        if small.any():
            values[small] = _values(packed[small], scale[small].float(), factor_2).bfloat16()
        restored[part] = values.flatten(1)
    return restored


def restore_mx(weight: Tensor, exponents: Tensor, largest_code: float) -> Tensor:
    """Returns a bf16 weight `[out, in]` that `mx.quantize_…`, in ModelOpt's arithmetic, turns into these bytes again.

    Args:
        weight: the dequantized weight, bf16, which is exact.
        exponents: uint8 `[out, in/32]`.
        largest_code: 6 or 448.
    """
    restored = torch.empty_like(weight)
    step = max(1, _CHUNK // max(weight.shape[1], 1))
    for first in range(0, len(weight), step):
        part = slice(first, first + step)
        blocks = weight[part].unflatten(1, (-1, mx.BLOCK))
        half = mx.power_of_two(exponents[part]).unsqueeze(-1) * (largest_code / 2)
        largest = blocks.abs().amax(-1, keepdim=True)
        moved = (largest == half) & (blocks.abs() == largest)
        blocks = torch.where(moved, blocks * (1 + 2**-5), blocks)
        restored[part] = torch.where((blocks == 0) & blocks.signbit(), -_TINY, blocks).flatten(1)
    return restored


def _values(packed: Tensor, scale: Tensor, factor_2: Tensor) -> Tensor:
    """The restored values, fp32 `[…, 16]`, of packed blocks `[…, 8]` under scales `[…]`."""
    codes = e2m1.unpack(packed.reshape(-1, BLOCK // 2)).reshape(*scale.shape, BLOCK)
    largest = codes.abs().amax(-1)
    moved = (scale == 2 * _LEAST) & (largest == 4)
    codes = torch.where(moved.unsqueeze(-1) & (codes.abs() == 4), codes * (4.75 / 4), codes)
    values: Tensor = codes * (scale * factor_2).unsqueeze(-1)
    values = torch.where((codes == 0) & codes.signbit(), -_TINY, values)
    hidden = (scale == _LEAST) & (values == 0).all(-1)
    values[..., 0] = torch.where(hidden, _TINY, values[..., 0])
    return values
