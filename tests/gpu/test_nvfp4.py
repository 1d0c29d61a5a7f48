"""The torch kernel on a GPU gives the bytes that it gives on a CPU. Needs CUDA: `make test-gpu`."""

import pytest
import torch

from export.kernels.nvfp4 import Arithmetic, NVFP4Weight, dequantize, quantize, tensor_amax


@pytest.mark.parametrize("arithmetic", Arithmetic)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (513, 1024), (4096, 2048)], ids=str)
@pytest.mark.parametrize("factor", [0.7, 1.0, 3.0])
def test_a_gpu_gives_the_same_bytes(
    shape: tuple[int, int], dtype: torch.dtype, arithmetic: Arithmetic, factor: float
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)
    weight[1:2, :16] = 0.0  # a block of zeros, where there is a second row
    amax = tensor_amax([weight], arithmetic=arithmetic) * factor
    expected = quantize(weight, amax, arithmetic=arithmetic)
    found = quantize(weight.cuda(), amax, arithmetic=arithmetic)
    for name in NVFP4Weight.__slots__:
        one, other = getattr(found, name).cpu(), getattr(expected, name)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
    assert torch.equal(dequantize(found).cpu(), dequantize(expected))
