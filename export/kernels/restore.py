"""The way back from blocks of small floats: a weight that quantizes to the very bytes it came from.

Codes times scales do not always do so, because bytes say more than values. NVFP4, in ModelOpt's arithmetic:

- Nibble 8 is a negative that rounds to zero, and -0.0 would become nibble 0. It becomes the smallest negative number.
- A block that rounds to zeros under the smallest scale held small numbers: a block of zeros would get scale 1.
- Scales are subnormal E4M3 numbers, with steps of a whole, where a block is small. Under twice the smallest, the
  largest value of a block may have rounded to 4, whose scale would be the smallest; it lay between 4.5 and 5.

All other blocks that ModelOpt makes hold a 6, from which their scale follows. The MX formats:

- A power of two is the smallest under which a block does not saturate, so its largest value lay above half of the
  largest code. What has rounded to that half gets a larger one that rounds to it, too.

Each stands in the place of a number that rounds to the same code, so a forward pass that quantizes sees no difference.
"""

import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1, mx
from amaxbridge.export.kernels.nvfp4 import BLOCK, NVFP4Weight

_CHUNK = 1 << 18  # elements at a time: they stay in the cache
_TINY = torch.finfo(torch.bfloat16).tiny
_LEAST = 2.0**-9
"""The smallest block scale."""


def restore_nvfp4(weight: NVFP4Weight, factor_2: Tensor) -> Tensor:
    """bf16 `[out, in]`, from which `nvfp4.quantize` in ModelOpt's arithmetic makes these codes and block scales.

    Two codes and their scale are looked up at once, in a table of all that there are; the few blocks under the smallest
    scales are then made one by one.

    Args:
        factor_2: `amax / 2688` of the amax that will be given to it, fp32.
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
    """bf16 `[out, in]`, from which `mx.quantize_…` in ModelOpt's arithmetic makes the codes and exponents again.

    Args:
        weight: dequantized, bf16, which is exact.
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
    """fp32 `[…, 16]` of blocks `[…, 8]` under scales `[…]`."""
    codes = e2m1.unpack(packed.reshape(-1, BLOCK // 2)).reshape(*scale.shape, BLOCK)
    largest = codes.abs().amax(-1)
    moved = (scale == 2 * _LEAST) & (largest == 4)
    codes = torch.where(moved.unsqueeze(-1) & (codes.abs() == 4), codes * (4.75 / 4), codes)
    values: Tensor = codes * (scale * factor_2).unsqueeze(-1)
    values = torch.where((codes == 0) & codes.signbit(), -_TINY, values)
    hidden = (scale == _LEAST) & (values == 0).all(-1)
    values[..., 0] = torch.where(hidden, _TINY, values[..., 0])
    return values
