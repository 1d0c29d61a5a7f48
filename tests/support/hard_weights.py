"""Weights that reach a quantizer's corner cases, and byte-wise comparison."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.nvfp4 import BLOCK, NVFP4Weight

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def of_module(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module, by local name."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def random_weight(rows: int = 24, columns: int = 96, std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


def zeros_and_negative_zeros() -> Tensor:
    """Blocks of zeros, of -0.0, and of both beside numbers."""
    weight = random_weight()
    weight[:, :16] = 0.0
    weight[::2, 16:32] = -0.0
    weight[:, 32::3] = -0.0
    weight[:, 33::3] = 0.0
    return weight


def ties() -> Tensor:
    """Every rounding tie of E2M1, its neighbours, and 6.0, in blocks of scale 2**-10 to 2**-3."""
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    block = torch.cat([bounds, -bounds, torch.tensor([6.0, -6.0])])
    rows = torch.stack([block, block * (1 + 2**-10), block * (1 - 2**-10)])
    rows[:, -2:] = block[-2:]  # the block's amax stays 6
    return torch.cat([rows * 2.0**-k for k in range(3, 11)], dim=1)


def block_scale_ties() -> Tensor:
    """Blocks whose scale lies on, or next to, a rounding tie of E4M3, down to its subnormals."""
    e4m3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (e4m3[1:] + e4m3[:-1]) / 2
    scales = torch.cat([middles, middles * (1 + 2**-7), middles * (1 - 2**-8), e4m3[1:]])
    ramp = torch.linspace(-6.0, 6.0, BLOCK)
    return (scales.unsqueeze(1) * ramp * 2.0**-10).reshape(-1, 9 * BLOCK)


def extremes() -> Tensor:
    """Blocks over the whole range of fp32, subnormals included, in one tensor."""
    ramp = torch.arange(BLOCK) - 7.5
    exponents = ((0, 5, 10, 15), (20, 60, 126, 140))
    return torch.stack([torch.cat([ramp * 2.0**-k for k in row]) for row in exponents])


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "small": random_weight,
    "large": lambda: random_weight(std=30.0, seed=1),
    "outlier": lambda: random_weight(seed=2).index_fill(0, torch.tensor([3]), 2.0),
    "zeros": zeros_and_negative_zeros,
    "ties": ties,
    "block scale ties": block_scale_ties,
    "extremes": extremes,
}
weights_of_all_kinds = pytest.mark.parametrize("kind", WEIGHTS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_arithmetics = pytest.mark.parametrize("arithmetic", Arithmetic)


def same_bytes(actual: Tensor, expected: Tensor) -> bool:
    as_bytes = [tensor.flatten().view(torch.uint8) for tensor in (actual, expected)]
    return actual.dtype == expected.dtype and torch.equal(*as_bytes)


def assert_same_weight(actual: NVFP4Weight, expected: NVFP4Weight) -> None:
    for name in ("packed", "block_scale", "global_scale"):
        assert same_bytes(getattr(actual, name), getattr(expected, name)), name
