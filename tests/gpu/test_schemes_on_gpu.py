"""Every scheme gives on a GPU the bytes that it gives on a CPU. Needs CUDA: `make test-gpu`."""

import pytest
import torch

from amaxbridge.export.amax.fused_group_amax import GroupAmax, StackAmax
from amaxbridge.export.kernels.arithmetic import Arithmetic
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


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_stacks_have_the_same_bytes(name: str, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
    """Five weights at once, each under an amax of its own."""
    scheme = SCHEMES[name]
    if not scheme.format and arithmetic is Arithmetic.MODELOPT:
        return  # ModelOpt has no quantizer for it
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(5 * 256, 1024, generator=generator) * torch.rand(5 * 256, 1, generator=generator)).to(dtype)
    of_weights = torch.tensor([0.1, 0.7, 1.3, 2.0, 5.0]) if scheme.needs_weight_amax else None
    of_inputs = torch.tensor([2.0, 3.0, 1.0, 0.5, 9.0]) if scheme.needs_input_amax else None
    amax = StackAmax(5, of_weights, of_inputs, arithmetic)
    expected, found = scheme.quantize_stack(rows, amax), scheme.quantize_stack(rows.cuda(), amax)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].cpu().flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key
