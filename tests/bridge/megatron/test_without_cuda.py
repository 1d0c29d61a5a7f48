"""The CPU shim: NVFP4 fake quantization is ModelOpt's to the last bit, and enabling it twice is enabling it once.

The reference is `NVFP4QTensor`, with the rule of the Triton kernel for small blocks: where the step of a block is below
1e-5, it is 1.0.
"""

import pytest
import torch

from amaxbridge.bridge.megatron.without_cuda import nvfp4_fake_quantize, without_cuda
from amaxbridge.export.kernels.e2m1 import VALUES, round_to_codes

qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is available")


def modelopt_nvfp4(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """ModelOpt's reference: pack to nibbles and unpack again; small blocks as the kernel rounds them."""
    packed, scale, double_scale = qtensor.NVFP4QTensor.quantize(values.clone(), 16, None, amax.float() / (6 * 448))
    unpacked = packed.dequantize(scale=scale, double_scale=double_scale, block_sizes={-1: 16})
    blocks, least = values.unflatten(-1, (-1, 16)), torch.tensor(1e-5)
    unclamped = (blocks.abs().amax(-1).float() / (6 * double_scale)).clamp(max=448).to(torch.float8_e4m3fn)
    is_small = (unclamped.float() * double_scale < least).unsqueeze(-1).expand(blocks.shape)
    nearest = torch.tensor(VALUES)[round_to_codes(blocks.float()).int() & 7] * blocks.float().sign() + 0.0
    return torch.where(is_small, nearest.to(values.dtype), unpacked.unflatten(-1, (-1, 16))).flatten(-2)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(256, 128), (64, 3, 128), (2, 5, 7, 48), (16,)])
@pytest.mark.parametrize("amax_factor", [1.0, 0.3, 7.0], ids=["own amax", "amax too small", "amax too large"])
@pytest.mark.parametrize("spread", [0.0, 3.0], ids=["even", "outliers"])
def test_equals_modelopt(dtype: torch.dtype, shape: tuple[int, ...], amax_factor: float, spread: float) -> None:
    torch.manual_seed(0)
    values = (torch.randn(shape) * 0.05 * torch.exp(spread * torch.randn(shape))).clamp(-6e4, 6e4).to(dtype)
    amax = (values.abs().amax() * amax_factor).to(dtype)
    assert_same_bits(nvfp4_fake_quantize(values, amax), modelopt_nvfp4(values, amax))


def test_equals_modelopt_at_ties_and_zeros() -> None:
    """Scale 1 exactly: every tie of the e2m1 grid and its neighbours, both zeros, a zero block, an overflow."""
    ties = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0])
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(0.0))])
    values = torch.zeros(4, 96)
    values[:, : near.numel()] = near
    values[1].neg_()
    values[2, 16:32] = 0.0
    values[3, 17] = 1e9
    values[:, ::16] = torch.tensor([6.0, -6.0, 0.0, 6.0])[:, None]
    amax = torch.tensor(6.0 * 448)
    assert_same_bits(nvfp4_fake_quantize(values, amax), modelopt_nvfp4(values, amax))


def test_small_blocks_beside_an_outlier_become_zero() -> None:
    """As in a trained model, some of whose inputs are thousands of times the others: engines and the kernel agree."""
    values = torch.full((3, 32), 0.01)
    values[:, 0] = 10_000.0
    rounded = nvfp4_fake_quantize(values, torch.tensor(10_000.0))
    assert rounded[:, 0].tolist() == [10_000.0] * 3
    assert rounded[:, 16:].abs().max() == 0


def test_leaves_its_input_alone() -> None:
    values = torch.randn(4, 32)
    before = values.clone()
    nvfp4_fake_quantize(values, values.abs().amax())
    assert torch.equal(values, before)


def test_rows_that_do_not_fill_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks of 16; got a tensor of shape \(4, 40\)"):
        nvfp4_fake_quantize(torch.randn(4, 40), torch.tensor(1.0))


def test_without_cuda_leaves_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    current_device = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with without_cuda():
        assert torch.cuda.current_device is current_device


def test_gradients_pass_straight_through() -> None:
    values = torch.randn(8, 32, requires_grad=True)
    amax = values.detach().abs().amax()
    with without_cuda():
        quantized = tensor_quant.DynamicBlockQuantizationFunction.apply(values, 16, amax, None, (2, 1), (4, 3))
    assert_same_bits(quantized.detach(), modelopt_nvfp4(values.detach(), amax))
    slope = torch.randn(8, 32)
    quantized.backward(slope)
    assert torch.equal(values.grad, slope)


@pytest.mark.parametrize("bits", [(4, 2, 9, 8), (8, 4, 9, 8)], ids=["mxfp4", "mxfp8"])
def test_other_block_formats_are_refused(bits: tuple[int, ...]) -> None:
    with without_cuda(), pytest.raises(NotImplementedError, match="only NVFP4"):
        tensor_quant.dynamic_block_quantize_op(torch.randn(4, 32), 32, None, *bits)
