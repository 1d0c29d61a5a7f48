"""NVFP4 on a GPU gives the bytes that it gives on a CPU. Needs CUDA: `make test-gpu`."""

import pytest
import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1, nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.nvfp4 import dequantize, quantize, tensor_amax
from tests.support.hard_weights import (
    DTYPES,
    WEIGHTS,
    all_arithmetics,
    all_dtypes,
    assert_same_weight,
    weights_of_all_kinds,
)

FACTORS = (0.01, 0.7, 1.0, 3.0)  # of the weight's own amax: where it is smaller, values saturate
BIG = (8192, 28672)


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)
    weight[1:2, :16] = 0.0  # a block of zeros, where there is a second row
    return weight


def assert_gpu_agrees(weight: Tensor, amax: Tensor, arithmetic: Arithmetic, block_amax: Tensor | None = None) -> None:
    expected = quantize(weight, amax, arithmetic=arithmetic, block_amax=block_amax)
    found = quantize(weight.cuda(), amax, arithmetic=arithmetic, block_amax=block_amax)
    on_cpu = nvfp4.NVFP4Weight(found.packed.cpu(), found.block_scale.cpu(), found.global_scale.cpu())
    assert_same_weight(on_cpu, expected)
    assert torch.equal(dequantize(found).cpu(), dequantize(expected))


def test_the_triton_kernels_are_used() -> None:
    assert e2m1.fits_triton(torch.zeros(1, device="cuda"))


@all_arithmetics
@all_dtypes
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (513, 1024), (4096, 2048)], ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_random_weights(shape: tuple[int, int], dtype: torch.dtype, arithmetic: Arithmetic, factor: float) -> None:
    weight = random_weight(shape, dtype)
    amax = tensor_amax([weight], arithmetic=arithmetic)
    assert torch.equal(tensor_amax([weight.cuda()], arithmetic=arithmetic).cpu(), amax)
    assert_gpu_agrees(weight, amax * factor, arithmetic)


@weights_of_all_kinds
@all_arithmetics
@all_dtypes
@pytest.mark.parametrize("factor", FACTORS)
def test_hard_weights(kind: str, dtype: torch.dtype, arithmetic: Arithmetic, factor: float) -> None:
    weight = WEIGHTS[kind]().to(dtype)
    assert_gpu_agrees(weight, tensor_amax([weight], arithmetic=arithmetic) * factor, arithmetic)


@all_arithmetics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_of_every_significand(dtype: torch.dtype, arithmetic: Arithmetic) -> None:
    """Amax whose steps have few bits, or are next to such: where a quotient lies on a bound, or next to one."""
    weight = torch.cat([make().flatten() for make in WEIGHTS.values()]).view(-1, 32).to(dtype)
    short = torch.arange(1.0, 2.0, 1 / 32)
    near = torch.stack([short * (1 + count * 2**-23) for count in range(-3, 4)]).flatten()
    for amax in torch.cat([near, near * 2688 / 2048, torch.rand(100, generator=torch.Generator().manual_seed(1)) + 1]):
        assert_gpu_agrees(weight, amax, arithmetic)


@all_arithmetics
@pytest.mark.parametrize("amax", [1e-30, 2.0**-21, 2.0**-20, 2.0**16, 2.0**17, 1e30], ids=str)
def test_amax_far_from_the_weights(amax: float, arithmetic: Arithmetic) -> None:
    for dtype in DTYPES:
        for scale in (2.0**-100, 1.0, 2.0**100):
            weight = (random_weight((64, 64), torch.float32) * scale).to(dtype)
            if weight.isfinite().all():
                assert_gpu_agrees(weight, torch.tensor(amax), arithmetic)


@all_dtypes
@pytest.mark.parametrize("factor", FACTORS)
def test_calibrated_blocks(dtype: torch.dtype, factor: float) -> None:
    weight = random_weight((64, 256), dtype)
    blocks = weight.float().abs().unflatten(1, (-1, 16)).amax(-1) * factor
    blocks[0, 0] = 0.0
    assert_gpu_agrees(weight, blocks.max(), Arithmetic.MODELOPT, blocks)


@all_arithmetics
def test_a_big_weight(arithmetic: Arithmetic) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    weight = torch.randn(BIG, generator=generator, device="cuda", dtype=torch.bfloat16).cpu()
    assert_gpu_agrees(weight, tensor_amax([weight], arithmetic=arithmetic), arithmetic)


def test_a_group_of_several_weights() -> None:
    weights = [random_weight((rows, 48), torch.bfloat16) for rows in (3, 200, 1)]
    for arithmetic in Arithmetic:
        expected = tensor_amax(weights, arithmetic=arithmetic)
        assert torch.equal(tensor_amax([each.cuda() for each in weights], arithmetic=arithmetic).cpu(), expected)
    mixed = [weights[0], weights[1].float()]
    assert tensor_amax([each.cuda() for each in mixed], arithmetic=Arithmetic.MODELOPT).cpu() == tensor_amax(
        mixed, arithmetic=Arithmetic.MODELOPT
    )


@all_dtypes
@all_arithmetics
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_an_error(value: float, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
    weight = random_weight((300, 64), dtype).cuda()
    weight[299, 63] = value
    assert not tensor_amax([weight], arithmetic=arithmetic).isfinite()
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(weight, torch.tensor(0.1), arithmetic=arithmetic)


def test_strided_and_unaligned_weights() -> None:
    flat = random_weight((1, 16 * 64 + 1), torch.bfloat16).cuda().flatten()
    for part in (flat[1:].view(16, 64), flat[:-1].view(16, 64)[1::2, 16:], flat[:-1].view(16, 64).T):
        assert_gpu_agrees(part.cpu(), torch.tensor(0.5), Arithmetic.MODELOPT)
        found = quantize(part, torch.tensor(0.5), arithmetic=Arithmetic.MODELOPT)
        expected = quantize(part.clone(), torch.tensor(0.5), arithmetic=Arithmetic.MODELOPT)
        assert_same_weight(found, expected)
