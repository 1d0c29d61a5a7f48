"""NVFP4 bytes against the programs that define them: ModelOpt (run here), llm-compressor (golden file)."""

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor, quantize_and_pack_fp4
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from torch import Tensor

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.nvfp4 import (
    BLOCK,
    NVFP4Weight,
    dequantize,
    global_scale,
    input_global_scale,
    quantize,
    tensor_amax,
)
from tests.support.hard_weights import (
    WEIGHTS,
    all_arithmetics,
    all_dtypes,
    assert_same_weight,
    random_weight,
    same_bytes,
    weights_of_all_kinds,
)
from tests.support.paths import GOLDEN

MODELOPT, COMPRESSED_TENSORS = Arithmetic.MODELOPT, Arithmetic.COMPRESSED_TENSORS
SCHEME = preset_name_to_scheme("NVFP4A16", ["Linear"])
PEER_BYTES = load_file(GOLDEN / "nvfp4_llmcompressor.safetensors")
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def ulps_apart(a: Tensor, b: Tensor, integers: torch.dtype) -> int:
    distance = (a.view(integers).long() - b.view(integers).long()).abs()
    return int(torch.where(a == b, 0, distance).max())  # 0.0 and -0.0 are equal


def modelopt_quantize(weight: Tensor, amax: Tensor) -> tuple[NVFP4QTensor, Tensor, Tensor]:
    result: tuple[NVFP4QTensor, Tensor, Tensor] = NVFP4QTensor.quantize(
        weight.clone(), BLOCK, weights_scaling_factor_2=amax.float() / 2688
    )
    return result


def modelopt_dequantize(weight: Tensor, amax: Tensor, dtype: torch.dtype) -> Tensor:
    quantized, scale, scale_2 = modelopt_quantize(weight, amax)
    result: Tensor = quantized.dequantize(dtype, scale=scale, double_scale=scale_2, block_sizes={-1: BLOCK})
    return result


def compressed_tensors_quantize(weight: Tensor, amax: Tensor) -> NVFP4Weight:
    """Does what llm-compressor does between observer and file, with compressed-tensors' own functions."""
    args = SCHEME.weights.model_copy(update={"scale_dtype": torch.float8_e4m3fn})
    amax = amax.to(weight.dtype).reshape(1)
    gparam = generate_gparam(-amax, amax)
    blocks = weight.unflatten(1, (-1, BLOCK))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=gparam)
    packed = quantize_and_pack_fp4(weight, scale, global_scale=gparam, group_size=BLOCK)
    return NVFP4Weight(packed, scale.to(torch.float8_e4m3fn), gparam)


# ModelOpt


@weights_of_all_kinds
@all_dtypes
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.999, 5.0], ids="amax x {}".format)
def test_modelopt_bytes_are_modelopts(kind: str, dtype: torch.dtype, factor: float) -> None:
    weight = WEIGHTS[kind]().to(dtype)
    amax = tensor_amax([weight], arithmetic=MODELOPT) * factor
    ours = quantize(weight, amax, arithmetic=MODELOPT)
    theirs, scale, scale_2 = modelopt_quantize(weight, amax)
    assert same_bytes(ours.packed, theirs._quantized_data)
    assert same_bytes(ours.block_scale, scale)
    assert same_bytes(ours.global_scale, 1 / scale_2.reshape(1))


@weights_of_all_kinds
@all_dtypes
def test_modelopt_dequantizes_to_the_same_value(kind: str, dtype: torch.dtype) -> None:
    """A divisor cannot always be the exact inverse of ``weight_scale_2``: two ulps in fp32, one in bf16."""
    weight = WEIGHTS[kind]().to(dtype)
    amax = tensor_amax([weight], arithmetic=MODELOPT)
    ours = quantize(weight, amax, arithmetic=MODELOPT)
    for out, integers, ulps in ((torch.float32, torch.int32, 2), (torch.bfloat16, torch.int16, 1)):
        theirs = modelopt_dequantize(weight, amax, out)
        assert ulps_apart(dequantize(ours, out), theirs, integers) <= ulps


@weights_of_all_kinds
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
def test_modelopt_dequantizes_bit_for_bit_where_the_inverse_is_exact(kind: str, out: torch.dtype) -> None:
    weight = WEIGHTS[kind]().bfloat16()
    amax = torch.tensor(2688 * 2.0**-11)
    ours = dequantize(quantize(weight, amax, arithmetic=MODELOPT), out)
    assert torch.equal(ours, modelopt_dequantize(weight, amax, out))


def test_a_bf16_tie_is_where_modelopt_and_the_stored_divisor_part() -> None:
    """An amax like 147 makes ``code * scale * amax / 2688`` an exact bf16 tie: one ulp of fp32 decides."""
    weight = random_weight(64, 256, std=40.0).bfloat16()
    apart = [
        ulps_apart(
            dequantize(quantize(weight, amax, arithmetic=MODELOPT)),
            modelopt_dequantize(weight, amax, torch.bfloat16),
            torch.int16,
        )
        for amax in torch.arange(128.0, 256.0)
    ]
    assert max(apart) == 1
    assert 0 < sum(apart) < 8  # of 128 amax


def test_amax_saturates_values_beyond_it() -> None:
    weight = random_weight(std=1.0)
    values = dequantize(quantize(weight, torch.tensor(0.5), arithmetic=MODELOPT), torch.float32)
    assert values.abs().max() == 0.5
    assert weight.abs().max() > 2


def test_a_block_below_1e_5_is_kept_as_the_exporter_does() -> None:
    """One of ModelOpt's fake-quantization kernels flushes this block to zero; its exporter does not."""
    weight = torch.full((1, BLOCK), 1e-5)
    amax = torch.tensor(0.1)
    ours = quantize(weight, amax, arithmetic=MODELOPT)
    assert float(ours.block_scale.float() / ours.global_scale) < 1e-5
    assert same_bytes(ours.packed, modelopt_quantize(weight, amax)[0]._quantized_data)
    assert dequantize(ours, torch.float32).min() > 0.9e-5


def test_zero_blocks_have_the_scale_of_their_program() -> None:
    for arithmetic, scale in ((MODELOPT, 1.0), (COMPRESSED_TENSORS, 0.125)):
        zeros = quantize(torch.zeros(1, BLOCK), torch.tensor(1.0), arithmetic=arithmetic)
        assert zeros.block_scale.float().tolist() == [[scale]]


def test_input_global_scale_inverts_modelopts_activation_scale() -> None:
    block_sizes = {-1: BLOCK, "type": "dynamic", "scale_bits": (4, 3)}
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=block_sizes))
    for amax in (0.017, 1.0, 5.3, 448.0, 9000.0):
        quantizer.amax = torch.tensor(amax)
        theirs = NVFP4QTensor.get_activation_scaling_factor(quantizer)
        assert same_bytes(input_global_scale(torch.tensor(amax)), 1 / theirs.reshape(1))


# compressed-tensors


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("group", GROUPS, ids="+".join)
@pytest.mark.parametrize("label", ["bf16", "fp32"])
def test_bytes_are_those_that_llm_compressor_wrote(label: str, group: tuple[str, ...], layer: int) -> None:
    weights = [PEER_BYTES[f"{label}/in/model.layers.{layer}.{name}.weight"] for name in group]
    amax = tensor_amax(weights, arithmetic=COMPRESSED_TENSORS)
    for name, weight in zip(group, weights, strict=True):
        prefix = f"{label}/out/model.layers.{layer}.{name}.weight_"
        expected = NVFP4Weight(*(PEER_BYTES[prefix + part] for part in ("packed", "scale", "global_scale")))
        assert_same_weight(quantize(weight, amax, arithmetic=COMPRESSED_TENSORS), expected)


def test_fp16_is_computed_in_fp32_because_the_peer_overflows() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight = PEER_BYTES[f"fp16/in/{name}"]
    amax = tensor_amax([weight], arithmetic=COMPRESSED_TENSORS)
    assert amax < 0.041
    assert PEER_BYTES[f"fp16/out/{name}_global_scale"].item() == 1.0
    ours = quantize(weight, amax, arithmetic=COMPRESSED_TENSORS)
    assert_same_weight(ours, quantize(weight.float(), amax, arithmetic=COMPRESSED_TENSORS))
    assert ours.global_scale.item() == pytest.approx(2688 / amax.item())


@weights_of_all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.3, 5.0], ids="amax x {}".format)
def test_compressed_tensors_bytes_are_its_own(kind: str, dtype: torch.dtype, factor: float) -> None:
    weight = WEIGHTS[kind]().to(dtype)
    amax = (tensor_amax([weight], arithmetic=COMPRESSED_TENSORS) * factor).to(dtype)
    ours = quantize(weight, amax, arithmetic=COMPRESSED_TENSORS)
    assert_same_weight(ours, compressed_tensors_quantize(weight, amax))


@weights_of_all_kinds
@all_arithmetics
def test_dequantize_is_compressed_tensors_decompress(kind: str, arithmetic: Arithmetic) -> None:
    weight = WEIGHTS[kind]().bfloat16()
    ours = quantize(weight, tensor_amax([weight], arithmetic=arithmetic), arithmetic=arithmetic)
    state = {
        "weight_packed": ours.packed,
        "weight_scale": ours.block_scale,
        "weight_global_scale": ours.global_scale,
    }
    assert same_bytes(dequantize(ours), NVFP4PackedCompressor.decompress(state, SCHEME)["weight"])


def test_global_scale_rounds_twice_in_the_weights_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for amax in torch.rand(200, generator=torch.Generator().manual_seed(0)).to(dtype):
            ours = global_scale(amax.float(), arithmetic=COMPRESSED_TENSORS, dtype=dtype)
            assert same_bytes(ours, generate_gparam(-amax, amax))


@pytest.mark.parametrize("amax", [0.0, 1e-38, float("nan")])
def test_compressed_tensors_goes_on_with_one_where_the_scale_overflows(amax: float) -> None:
    scale = global_scale(torch.tensor(amax), arithmetic=COMPRESSED_TENSORS, dtype=torch.bfloat16)
    assert scale.tolist() == [1.0]
