"""The runtime on a GPU: its Triton kernels against plain arithmetic, its layers against the CPU. `make test-gpu`.

The tests whose names have `kernel` also run in Triton's interpreter: `tests/export/runtime/test_runtime_kernels.py`.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.runtime import (
    CompressedLinear,
    CompressedTensorsConfig,
    CompressedTensorsWNA16Scheme,
    marlin_permute_scales,
    marlin_repack,
    triton_kernels,
)
from amaxbridge.export.runtime.activations import activation_for, quantize_int8
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.schemes.scheme import quantize_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
some_tokens = pytest.mark.parametrize("tokens", [1, 5, 70], ids="tokens{}".format)


def random_integers(low: int, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(DEVICE)


def random_inputs(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(DEVICE, dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double() / scale, expected.double() / scale, rtol=0, atol=tolerance)


def packed_rows(codes: Tensor) -> Tensor:
    """Codes 0 … 15 `[in, out]` as GPTQ packs them: eight inputs in a word."""
    shifts = torch.arange(0, 32, 4, device=DEVICE)[:, None]
    return (codes.unflatten(0, (-1, 8)) << shifts).sum(1).to(torch.int32)


# Kernels


@some_tokens
@pytest.mark.parametrize("group_size", [32, 128, 256, -1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_zero_points", [False, True], ids=["symmetric", "zero points"])
def test_int4_kernel(tokens: int, group_size: int, dtype: torch.dtype, has_zero_points: bool) -> None:
    size_k, size_n = 256, 192
    groups = 1 if group_size == -1 else size_k // group_size
    codes = random_integers(0, 16, size_k, size_n)
    scales = random_integers(1, 100, groups, size_n).float() / 977
    zero_points = random_integers(-8, 8, size_n, groups).to(torch.int8)
    x = random_inputs(tokens, size_k, dtype)
    values = codes.float() - 8
    if has_zero_points:
        values = values - zero_points.float().T.repeat_interleave(size_k // groups, 0)
    weight = (values * scales.repeat_interleave(size_k // groups, 0)).to(dtype)
    order = torch.empty(0, dtype=torch.int, device=DEVICE)
    found = triton_kernels.int4_matmul(
        x,
        marlin_repack(packed_rows(codes), order, size_k, size_n, 4),
        marlin_permute_scales(scales, size_k, size_n, group_size),
        group_size=group_size,
        has_single_scale=groups == 1,
        zero_points=zero_points if has_zero_points else None,
    )
    assert found.dtype == dtype
    assert_close(found, x.double() @ weight.double())


@some_tokens
def test_int4_kernel_under_act_order(tokens: int) -> None:
    size_k, size_n, group_size = 128, 64, 32
    codes, scales = random_integers(0, 16, size_k, size_n), random_integers(1, 100, 4, size_n).float() / 977
    groups = torch.randperm(size_k, generator=torch.Generator().manual_seed(3)).to(DEVICE) // group_size
    in_order, order = groups.sort(stable=True)
    x = random_inputs(tokens, size_k)
    found = triton_kernels.int4_matmul(
        x[:, order],
        marlin_repack(packed_rows(codes), order, size_k, size_n, 4),
        marlin_permute_scales(scales, size_k, size_n, group_size),
        group_size=group_size,
        has_single_scale=False,
        groups=in_order.int(),
    )
    assert_close(found, x.double() @ ((codes - 8) * scales[groups]).double())


@some_tokens
@pytest.mark.parametrize("shape", [(64, 128), (100, 200)], ids=["whole blocks", "parts of blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_int8_kernel(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Exact: the product in int32, the scales in fp32."""
    rows, columns = shape
    x, weight = random_integers(-128, 128, tokens, columns).to(torch.int8), random_integers(-128, 128, rows, columns)
    x_scale, scale = torch.rand(tokens, 1, device=DEVICE), torch.rand(rows, device=DEVICE)
    found = triton_kernels.int8_matmul(x, weight.to(torch.int8).T, x_scale, scale, dtype)
    product = x.cpu().long() @ weight.cpu().long().T
    assert torch.equal(found.cpu(), (product.float() * x_scale.cpu() * scale.cpu()).to(dtype))


def test_kernels_of_no_tokens() -> None:
    x = torch.empty(0, 128, dtype=torch.int8, device=DEVICE)
    scale = torch.ones(64, device=DEVICE)
    weight = torch.zeros(128, 64, dtype=torch.int8, device=DEVICE)
    assert triton_kernels.int8_matmul(x, weight, scale[:0, None], scale, torch.float32).shape == (0, 64)
    packed = torch.zeros(8, 128, dtype=torch.int32, device=DEVICE)
    one = {"group_size": -1, "has_single_scale": True}
    assert triton_kernels.int4_matmul(x.float(), packed, scale[None], **one).shape == (0, 64)


# Layers


def layer_of(name: str, weights: list[Tensor], bias: Tensor | None) -> tuple[CompressedLinear, list[dict[str, Tensor]]]:
    """A merged layer on the device, and the tensors of its modules."""
    scheme = SCHEMES[name]
    config = CompressedTensorsConfig.from_config(quantization_config({"m": scheme}, []))
    method = config.get_quant_method(nn.Linear(1, 1), "m")
    assert method is not None
    amax = GroupAmax(torch.tensor(0.2, device=DEVICE), torch.tensor(4.0, device=DEVICE))
    members = {str(number): weight for number, weight in enumerate(weights)}
    parts: list[dict[str, Tensor]] = [{} for _ in weights]
    for tensor_name, tensor in quantize_tensors(scheme, members, amax if scheme.needs_input_amax else None):
        number, _, local = tensor_name.partition(".")
        parts[int(number)][local] = tensor
    with torch.device(DEVICE):
        layer = CompressedLinear(method, weights[0].shape[1], [len(weight) for weight in weights], bias=bias)
    for number, part in enumerate(parts):
        for local, tensor in part.items():
            parameter = layer.get_parameter(local)
            parameter.weight_loader(parameter, tensor, number)
    method.process_weights_after_loading(layer)
    return layer, parts


@some_tokens
@pytest.mark.parametrize("name", SCHEMES)
def test_layers(name: str, tokens: int) -> None:
    """What a layer computes on the GPU, against the same on the CPU: the weight and the inputs to the bit."""
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(rows, 256, generator=generator) * 0.04).to(DEVICE) for rows in (128, 256)]
    bias = torch.linspace(-1, 1, 384).to(DEVICE)
    layer, parts = layer_of(name, weights, bias)
    scheme = SCHEMES[name]
    on_cpu = [{key: tensor.cpu() for key, tensor in part.items()} for part in parts]
    weight = torch.cat([scheme.dequantize(part) for part in on_cpu])
    assert torch.equal(layer.dequantized().cpu(), weight)
    x = random_inputs(tokens, 256)
    inputs = x.cpu()
    if name == "w8a8":
        codes, scale = quantize_int8(inputs)
        assert torch.equal(quantize_int8(x)[0].cpu(), codes)
        inputs = codes * scale
    elif (activation := activation_for(layer.method.signature)) is not None:
        number = layer.get_parameter(activation.scale)[:1] if activation.scale else x
        inputs = activation.round(inputs, number.cpu())
        assert torch.equal(activation.round(x, number).cpu(), inputs)
    expected = linear(inputs.double(), weight.double(), bias.cpu().double())
    found = layer(x.unsqueeze(0)).squeeze(0).cpu().double()
    assert float((found - expected).norm() / expected.norm()) < 4e-3  # integer weights are not rounded to bf16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("actorder", [None, "group"])
def test_layers_of_packed_integers(bits: int, actorder: str | None) -> None:
    scheme = CompressedTensorsWNA16Scheme(weight_bits=bits, group_size=64, symmetric=True, actorder=actorder)
    with torch.device(DEVICE):
        layer = nn.Module()
        scheme.create_weights(layer, 256, [128], 256, 128, torch.bfloat16)
        tensors = {
            "weight_packed": random_integers(-(2**31), 2**31, 128, 256 * bits // 32).to(torch.int32),
            "weight_scale": torch.rand(128, 4) / 100,
            "weight_shape": torch.tensor([128, 256]),
            "weight_g_idx": torch.randperm(256).int() // 64,
        }
    for name, parameter in layer.named_parameters():
        parameter.weight_loader(parameter, tensors[name])
    scheme.process_weights_after_loading(layer)
    x = random_inputs(33, 256, torch.bfloat16)
    assert_close(scheme.apply(layer, x), x.double() @ scheme.weight(layer).double().T)
