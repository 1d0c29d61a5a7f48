"""E2M1, the 4-bit float of NVFP4 and MXFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign. Rounding, packing, reading.

The plain torch code works on any device and defines the bytes. For bf16 weights on a CPU, `quantize_by_tables` makes
the
same bytes from integer tables: this arithmetic, evaluated on every magnitude that a bf16 can have. On a GPU the kernels
of `e2m1_triton` make them.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amaxbridge.export.kernels.compiled import Loop

_largest_magnitude = Loop("e2m1_loops", "largest_magnitude")
_code_bounds, _quantize_blocks = Loop("e2m1_loops", "code_bounds"), Loop("e2m1_loops", "quantize_blocks")

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_to_codes(scaled: Tensor) -> Tensor:
    """E2M1 codes (uint8) of floats: nearest, ties to even, saturating at 6; bit 3 is the sign, -0.0 is code 0.

    ModelOpt rounds with `searchsorted` and corrects ties afterwards. Seven comparisons give the same codes, need no
    correction, and are faster.
    """
    magnitude = scaled.abs()
    codes = (scaled < 0).to(torch.uint8) << 3
    for bound in (0.25, 1.25, 2.5, 5.0):
        codes += magnitude > bound
    for bound in (0.75, 1.75, 3.5):
        codes += magnitude >= bound
    return codes


def pack(codes: Tensor) -> Tensor:
    """Packs codes `[rows, columns]` into bytes `[rows, columns/2]`, the even column in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Returns the values of packed codes `[rows, columns/2]`: fp32 `[rows, columns]`."""
    values = torch.tensor(VALUES + tuple(-value for value in VALUES), device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((values[byte & 0xF], values[byte >> 4]), dim=-1)  # [256, 2]
    return pairs[packed.int()].flatten(1)


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of `e2m1_loops.quantize_blocks`: `scale_of` uint8 `[32768]`, `bounds` uint16 `[256, 8]`, in numpy."""

    scale_of: Any
    bounds: Any

    @classmethod
    def of(cls, scale_bytes: Tensor, steps: Tensor, *, round_quotient: bool = False) -> "Tables":
        """Builds the tables from the reference arithmetic.

        Args:
            scale_bytes: uint8 `[32768]`, the scale byte of a block whose amax is each of `magnitudes()`.
            steps: fp32 `[n]`, n ≤ 256: the value of code 1.0 under each scale byte.
            round_quotient: True if the reference rounds `value / step` to bf16.
        """
        bounds = np.empty((len(steps), 8), np.uint16)
        _code_bounds(steps.numpy(), round_quotient, bounds)
        return cls(scale_bytes.numpy(), bounds)


@cache
def magnitudes() -> Tensor:
    """Every non-negative bf16 in the order of its bits, `[32768]`; infinity and the NaNs come last."""
    return torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16)


def fits_loops(weight: Tensor) -> bool:
    """True if the compiled loops take this weight: bf16, in CPU memory."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def fits_triton(weight: Tensor) -> bool:
    """True if the Triton kernels take this weight: it is on a GPU that they support."""
    return weight.is_cuda and _has_triton_kernels(weight.device.index)


@cache
def _has_triton_kernels(device: int) -> bool:
    """True for NVIDIA GPUs that convert to E4M3 (Ada, Hopper and later) if Triton is installed."""
    capable = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
    return capable and find_spec("triton") is not None


def check_finite(bad: Tensor) -> None:
    """Waits for the flag that a Triton kernel sets on a weight that is not finite.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    if bad.item():
        raise ValueError(NOT_FINITE)


def largest_magnitude(weight: Tensor) -> Tensor:
    """The largest `|w|` of a bf16 weight on the CPU: fp32, 0-d; NaN or Inf if the weight holds one."""
    found = _largest_magnitude(weight.contiguous().view(-1).view(torch.uint16).numpy())
    return torch.tensor(found << 16, dtype=torch.int32).view(torch.float32)


def quantize_by_tables(
    weight: Tensor, width: int, tables: Tables, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 `[out, in/2]` and scale bytes uint8 `[out, in/width]` of a bf16 weight `[out, in]` on the CPU.

    Args:
        into: the tensors that are filled and returned; None for new ones.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    packed, scales = empty_codes(weight, width) if into is None else into
    bits = weight.contiguous().view(torch.uint16).numpy()
    codes, scale_bytes = packed.numpy(), scales.view(-1).numpy()
    largest = _quantize_blocks(bits, width, tables.scale_of, tables.bounds, codes, scale_bytes)
    if largest > 0x7F7F:
        raise ValueError(NOT_FINITE)
    return packed, scales


def empty_codes(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Memory for packed codes uint8 `[out, in/2]` and the scale bytes uint8 `[out, in/width]` of blocks."""
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    return packed, torch.empty(rows, columns // width, dtype=torch.uint8, device=weight.device)


NOT_FINITE = "the weight holds NaN or Inf"
