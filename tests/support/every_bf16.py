"""Weights that hold every bf16 value, and the schemes that they are quantized with."""

from collections.abc import Callable

import torch
from torch import Tensor

from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic

INFINITY = 0x7F80  # as bits of a bf16, without a sign
EVERY_MAGNITUDE = torch.arange(INFINITY, dtype=torch.int16).view(torch.bfloat16)
LARGEST = (1, 0x7F, 0x80, 0x0101, 0x2A55, 0x3B80, 0x3BAB, 0x3D4D, 0x3F80, 0x40C0, 0x40FF, 0x5FFF, 0x7EFF)  # of a block

type Quantize = Callable[[Tensor], tuple[Tensor, ...]]


def nvfp4_of(arithmetic: Arithmetic, amax: float) -> Quantize:
    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        found = nvfp4.quantize(weight, torch.tensor(amax), arithmetic=arithmetic)
        return found.packed, found.block_scale, found.global_scale

    return quantize


def every_block_amax(width: int) -> Tensor:
    """A block for each magnitude: it comes first, then others below it, of both signs, and zeros of both."""
    share = torch.rand(INFINITY, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blocks = (EVERY_MAGNITUDE.float().unsqueeze(1) * share).bfloat16()
    blocks[:, 0], blocks[:, 1], blocks[:, 2] = EVERY_MAGNITUDE, 0.0, -0.0
    return blocks


def every_value(width: int) -> Tensor:
    """Blocks in which every bf16, of either sign, stands under each of `LARGEST` that is not below it."""
    rows = []
    for largest in LARGEST:
        below = EVERY_MAGNITUDE[: largest + 1]
        values = torch.cat([below, -below])
        values = torch.nn.functional.pad(values, (0, -len(values) % (width - 1))).view(-1, width - 1)
        rows.append(torch.cat([below[-1].expand(len(values), 1), values], dim=1))
    return torch.cat(rows)
