"""The way back from NVFP4: a weight that quantizes to the very bytes it came from.

Codes times scales do not always do so, because bytes say more than values:

- Nibble 8 is a negative that rounds to zero, and -0.0 would become nibble 0. It becomes the smallest negative number.
- A block that rounds to zeros under the smallest scale held small numbers: a block of zeros would get scale 1.
- Scales are subnormal E4M3 numbers, with steps of a whole, where a block is small. Under twice the smallest, the
  largest value of a block may have rounded to 4, whose scale would be the smallest; it lay between 4.5 and 5.

Each stands in the place of a number that rounds to the same code, so a forward pass that quantizes sees no difference.
All other blocks that ModelOpt's arithmetic makes hold a 6, from which their scale follows.
"""

import torch
from torch import Tensor

from export.kernels import e2m1
from export.kernels.nvfp4 import BLOCK, NVFP4Weight

_CHUNK = 1 << 20  # elements at a time
_LEAST = 2.0**-9
"""The smallest block scale."""


def restore(weight: NVFP4Weight, factor_2: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[out, in]`, from which `nvfp4.quantize` in ModelOpt's arithmetic makes these codes and block scales.

    Args:
        factor_2: `amax / 2688` of the amax that will be given to it, fp32.
        dtype: bf16 or fp32, whose smallest numbers are small enough.
    """
    rows, columns = weight.packed.shape[0], weight.packed.shape[1] * 2
    restored = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values = _values(weight.packed[part], weight.block_scale[part].float(), factor_2)
        restored[part] = values.flatten(1)
    return restored


def _values(packed: Tensor, scale: Tensor, factor_2: Tensor) -> Tensor:
    """fp32 `[rows, blocks, 16]`."""
    codes = e2m1.unpack(packed).unflatten(1, (-1, BLOCK))
    largest = codes.abs().amax(-1)
    moved = (scale == 2 * _LEAST) & (largest == 4)
    if moved.any():
        codes = codes.where(~(moved.unsqueeze(-1) & (codes.abs() == 4)), codes * (4.75 / 4))
    values = codes * (scale * factor_2).unsqueeze(-1)
    tiny = torch.finfo(torch.bfloat16).tiny
    values = values.where(~((codes == 0) & codes.signbit()), -tiny)
    hidden = (scale == _LEAST) & (values == 0).all(-1)
    values[..., 0] = values[..., 0].where(~hidden, tiny)
    return values
