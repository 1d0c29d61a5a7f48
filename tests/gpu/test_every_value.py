"""On a GPU, every bf16 there is, as a block's amax and as a value, gives the bytes of a CPU. Needs CUDA."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from amaxbridge.export.kernels import mx, scaled
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Blocks, Code
from tests.support.every_bf16 import every_block_amax, every_value, nvfp4_of
from tests.support.hard_weights import DTYPES, WEIGHTS, all_arithmetics, all_dtypes, same_bytes, weights_of_all_kinds

all_values = pytest.mark.parametrize("blocks", [every_block_amax, every_value])
MX = pytest.mark.parametrize("quantize", [mx.quantize_mxfp4, mx.quantize_mxfp8])
FP8_BLOCKS = (Blocks(), Blocks(None, None), Blocks(128, 128), Blocks(7, 16), Blocks(3, None))

type Quantize = Callable[[Tensor], tuple[Tensor, ...]]


def assert_gpu_agrees(quantize: Quantize, weight: Tensor) -> None:
    for found, expected in zip(quantize(weight.cuda()), quantize(weight), strict=True):
        assert same_bytes(found.cpu(), expected)


@all_values
@all_arithmetics
@pytest.mark.parametrize("amax", [1e-30, 0.0123, 0.1, 1.0, 147.0, 3e38])
def test_nvfp4(blocks: Callable[[int], Tensor], amax: float, arithmetic: Arithmetic) -> None:
    assert_gpu_agrees(nvfp4_of(arithmetic, amax), blocks(16))


@all_values
@all_arithmetics
@MX
def test_mx(
    quantize: Callable[[Tensor, Arithmetic], tuple[Tensor, Tensor]],
    blocks: Callable[[int], Tensor],
    arithmetic: Arithmetic,
) -> None:
    assert_gpu_agrees(lambda weight: quantize(weight, arithmetic), blocks(32))


@weights_of_all_kinds
@all_arithmetics
@all_dtypes
@MX
def test_mx_on_hard_weights(
    quantize: Callable[[Tensor, Arithmetic], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    arithmetic: Arithmetic,
    kind: str,
) -> None:
    weight = WEIGHTS[kind]()
    assert_gpu_agrees(
        lambda rows: quantize(rows, arithmetic), weight.flatten()[: weight.numel() // 32 * 32].view(-1, 32).to(dtype)
    )


def test_mx_on_every_fp16() -> None:
    every = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    blocks = every.unsqueeze(1) * torch.linspace(-1, 1, 32, dtype=torch.float16)
    for quantize in (mx.quantize_mxfp4, mx.quantize_mxfp8):
        for arithmetic in Arithmetic:
            assert_gpu_agrees(lambda rows, q=quantize, a=arithmetic: q(rows, a), blocks)


@all_values
@pytest.mark.parametrize("calibrated", [False, True])
def test_fp8(blocks: Callable[[int], Tensor], calibrated: bool) -> None:
    weight = blocks(32)
    amax = torch.full((len(weight), 1), 0.7) if calibrated else None
    assert_gpu_agrees(fp8_of(Blocks(), amax), weight)


@weights_of_all_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", FP8_BLOCKS, ids=str)
@pytest.mark.parametrize("factor", [None, 0.7, 1.0])
def test_fp8_blocks(blocks: Blocks, dtype: torch.dtype, factor: float | None, kind: str) -> None:
    weight = WEIGHTS[kind]().view(-1, 32).to(dtype)
    amax = None if factor is None else scaled.largest(weight, blocks).float() * factor
    assert_gpu_agrees(fp8_of(blocks, amax), weight)


def fp8_of(blocks: Blocks, amax: Tensor | None) -> Quantize:
    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        found = scaled.quantize(weight, Code.E4M3, blocks, amax=amax)
        return found.codes, found.scale

    return quantize


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_finite_is_an_error(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(200, 64, dtype=dtype, device="cuda")
    weight[150, 40] = value
    for quantize in (mx.quantize_mxfp4, mx.quantize_mxfp8):
        with pytest.raises(ValueError, match="NaN or Inf"):
            quantize(weight, Arithmetic.MODELOPT)
    for blocks in FP8_BLOCKS:
        for amax in (None, torch.ones(blocks.shape(*weight.shape))):
            with pytest.raises(ValueError, match="NaN or Inf"):
                scaled.quantize(weight, Code.E4M3, blocks, amax=amax)
