"""Every scheme gives on a GPU the bytes that it gives on a CPU. Needs CUDA: `make test-gpu`."""

import pytest
import torch

from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.schemes.scheme import quantize_tensors


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_gpu_gives_the_same_bytes(name: str, dtype: torch.dtype, calibrated: bool) -> None:
    scheme = SCHEMES[name]
    if scheme.needs_input_amax:
        calibrated = True
    if not scheme.format:
        calibrated = False
    amax = GroupAmax(torch.tensor(0.1), torch.tensor(2.0)) if calibrated else None
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(300, 1024, generator=generator) * torch.rand(300, 1, generator=generator)).to(dtype)
    weight[1, :128] = 0.0
    expected = dict(quantize_tensors(scheme, {"m": weight}, amax))
    found = dict(quantize_tensors(scheme, {"m": weight.cuda()}, amax))
    for tensor, other in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(tensor.cpu().flatten().view(torch.uint8), other.flatten().view(torch.uint8))
