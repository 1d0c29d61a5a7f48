"""NVFP4 bytes against the programs that define them: ModelOpt (run here), llm-compressor (golden file)."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor, quantize_and_pack_fp4
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from torch import Tensor

from export.kernels import nvfp4
from export.kernels.nvfp4 import (
    BLOCK,
    Arithmetic,
    NVFP4Weight,
    dequantize,
    global_scale,
    input_global_scale,
    quantize,
    tensor_amax,
)

MODELOPT, COMPRESSED_TENSORS = Arithmetic.MODELOPT, Arithmetic.COMPRESSED_TENSORS
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SCHEME = preset_name_to_scheme("NVFP4A16", ["Linear"])
GOLDEN = load_file(Path(__file__).parent / "golden" / "nvfp4_llmcompressor.safetensors")
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def random_weight(rows: int = 24, columns: int = 96, std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


def zeros_and_negative_zeros() -> Tensor:
    """Return whole zero blocks, -0.0 blocks, and both beside numbers."""
    weight = random_weight()
    weight[:, :16] = 0.0
    weight[::2, 16:32] = -0.0
    weight[:, 32::3] = -0.0
    weight[:, 33::3] = 0.0
    return weight


def ties() -> Tensor:
    """Return every rounding tie of E2M1, its neighbours, and 6.0, in blocks of scale 2**-10 to 2**-3."""
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    block = torch.cat([bounds, -bounds, torch.tensor([6.0, -6.0])])
    rows = torch.stack([block, block * (1 + 2**-10), block * (1 - 2**-10)])
    rows[:, -2:] = block[-2:]  # the block's amax stays 6
    return torch.cat([rows * 2.0**-k for k in range(3, 11)], dim=1)


def block_scale_ties() -> Tensor:
    """Return blocks whose scale lies on, or next to, a rounding tie of E4M3, down to its subnormals."""
    e4m3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (e4m3[1:] + e4m3[:-1]) / 2
    scales = torch.cat([middles, middles * (1 + 2**-7), middles * (1 - 2**-8), e4m3[1:]])
    ramp = torch.linspace(-6.0, 6.0, BLOCK)
    return (scales.unsqueeze(1) * ramp * 2.0**-10).reshape(-1, 9 * BLOCK)


def extremes() -> Tensor:
    """Return blocks over the whole range of fp32, subnormals included, in one tensor."""
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
    as_bytes = [tensor.contiguous().view(torch.uint8) for tensor in (actual, expected)]
    return actual.dtype == expected.dtype and torch.equal(*as_bytes)


def assert_same_weight(actual: NVFP4Weight, expected: NVFP4Weight) -> None:
    for name in ("packed", "block_scale", "global_scale"):
        assert same_bytes(getattr(actual, name), getattr(expected, name)), name


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
    """Do what llm-compressor does between observer and file, with compressed-tensors' own functions."""
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
    weights = [GOLDEN[f"{label}/in/model.layers.{layer}.{name}.weight"] for name in group]
    amax = tensor_amax(weights, arithmetic=COMPRESSED_TENSORS)
    for name, weight in zip(group, weights, strict=True):
        prefix = f"{label}/out/model.layers.{layer}.{name}.weight_"
        expected = NVFP4Weight(*(GOLDEN[prefix + part] for part in ("packed", "scale", "global_scale")))
        assert_same_weight(quantize(weight, amax, arithmetic=COMPRESSED_TENSORS), expected)


def test_fp16_is_computed_in_fp32_because_the_peer_overflows() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight = GOLDEN[f"fp16/in/{name}"]
    amax = tensor_amax([weight], arithmetic=COMPRESSED_TENSORS)
    assert amax < 0.041
    assert GOLDEN[f"fp16/out/{name}_global_scale"].item() == 1.0
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


# Laws


@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 6),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    arithmetic=st.sampled_from(Arithmetic),
)
@settings(max_examples=60, deadline=None)
def test_chunks_do_not_show(
    rows: int, blocks: int, chunk: int, seed: int, dtype: torch.dtype, arithmetic: Arithmetic
) -> None:
    weight = random_weight(rows, blocks * BLOCK, seed=seed).to(dtype)
    amax = tensor_amax([weight], arithmetic=arithmetic)
    whole = quantize(weight, amax, arithmetic=arithmetic)
    values = dequantize(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvfp4, "_CPU_CHUNK", chunk)
        assert_same_weight(quantize(weight, amax, arithmetic=arithmetic), whole)
        assert torch.equal(dequantize(whole), values)
    assert whole.packed.shape == (rows, blocks * BLOCK // 2)
    assert whole.block_scale.shape == (rows, blocks)


@given(seed=st.integers(0, 2**31), columns=st.integers(1, 5), arithmetic=st.sampled_from(Arithmetic))
@settings(max_examples=40, deadline=None)
def test_quantizing_rows_and_columns_apart_is_quantizing_the_whole(
    seed: int, columns: int, arithmetic: Arithmetic
) -> None:
    """What lets ranks and shards quantize on their own, given the group's amax; slices may be strided."""
    weight = random_weight(6, (columns + 1) * BLOCK, seed=seed).bfloat16()
    amax = tensor_amax([weight[:2], weight[2:]], arithmetic=arithmetic)
    assert amax == tensor_amax([weight], arithmetic=arithmetic)
    whole = quantize(weight, amax, arithmetic=arithmetic)
    part = quantize(weight[1::2, BLOCK:], amax, arithmetic=arithmetic)
    assert same_bytes(part.packed, whole.packed[1::2, BLOCK // 2 :])
    assert same_bytes(part.block_scale, whole.block_scale[1::2, 1:])


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), arithmetic=st.sampled_from(Arithmetic))
@settings(max_examples=40, deadline=None)
def test_a_value_moves_by_at_most_half_a_step(seed: int, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
    """The widest step of E2M1 is 2; a block scale is off by at most 1/16."""
    weight = random_weight(8, 64, seed=seed).to(dtype)
    amax = tensor_amax([weight], arithmetic=arithmetic)
    error = dequantize(quantize(weight, amax, arithmetic=arithmetic), torch.float32) - weight.float()
    block_amax = weight.float().abs().unflatten(1, (-1, BLOCK)).amax(-1, keepdim=True)
    assert (error.unflatten(1, (-1, BLOCK)).abs() <= block_amax / 6 * (1 + 1 / 8)).all()


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0)])
@all_arithmetics
def test_an_empty_shard_stays_empty(shape: tuple[int, int], arithmetic: Arithmetic) -> None:
    quantized = quantize(torch.zeros(shape), torch.tensor(1.0), arithmetic=arithmetic)
    assert dequantize(quantized).shape == shape


# Errors


@pytest.mark.parametrize("shape", [(4, 24), (4, 8), (32,), (2, 4, 16)])
def test_a_shape_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        quantize(torch.ones(shape), torch.tensor(1.0), arithmetic=MODELOPT)


@pytest.mark.parametrize("amax", [0.0, -1.0, 1e-39, float("nan"), float("inf")])
def test_an_amax_without_a_scale_is_an_error(amax: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        quantize(torch.ones(1, BLOCK), torch.tensor(amax), arithmetic=MODELOPT)
    with pytest.raises(ValueError, match="positive and finite"):
        input_global_scale(torch.tensor(amax))


@pytest.mark.parametrize("amax", [-1.0, float("inf")])
def test_an_amax_that_breaks_compressed_tensors_is_an_error(amax: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        quantize(torch.ones(1, BLOCK), torch.tensor(amax), arithmetic=COMPRESSED_TENSORS)


@all_arithmetics
def test_amax_has_one_element_of_any_shape(arithmetic: Arithmetic) -> None:
    weight = random_weight()
    expected = quantize(weight, torch.tensor(0.1), arithmetic=arithmetic)
    assert_same_weight(quantize(weight, torch.tensor([0.1]), arithmetic=arithmetic), expected)
    with pytest.raises(ValueError, match=r"one amax .*\(24,\)"):
        quantize(weight, torch.ones(24), arithmetic=arithmetic)


@all_arithmetics
def test_an_unsupported_dtype_is_an_error(arithmetic: Arithmetic) -> None:
    with pytest.raises(ValueError, match="float64"):
        quantize(torch.ones(1, BLOCK, dtype=torch.float64), torch.tensor(1.0), arithmetic=arithmetic)


def test_amax_of_a_group_needs_weights_of_one_dtype() -> None:
    with pytest.raises(ValueError, match="no weights"):
        tensor_amax([], arithmetic=MODELOPT)
    with pytest.raises(ValueError, match=r"\(0, 16\)"):
        tensor_amax([torch.ones(0, 16)], arithmetic=MODELOPT)
    mixed = [torch.ones(1, 16), torch.full((1, 16), 2.0, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"bfloat16, torch\.float32"):
        tensor_amax(mixed, arithmetic=COMPRESSED_TENSORS)
    assert tensor_amax(mixed, arithmetic=MODELOPT) == 2.0


@all_arithmetics
@all_dtypes
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_an_error(arithmetic: Arithmetic, dtype: torch.dtype, value: float) -> None:
    weight = random_weight().to(dtype)
    weight[3, 20] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(weight, torch.tensor(0.1), arithmetic=arithmetic)


def test_a_quantized_weight_checks_its_tensors() -> None:
    good = quantize(random_weight(), torch.tensor(0.1), arithmetic=MODELOPT)
    with pytest.raises(ValueError, match=r"block_scale is torch\.uint8"):
        NVFP4Weight(good.packed, good.block_scale.view(torch.uint8), good.global_scale)
    with pytest.raises(ValueError, match=r"block_scale is .*\(24, 1\)"):
        NVFP4Weight(good.packed, good.block_scale[:, :1], good.global_scale)
    with pytest.raises(ValueError, match=r"global_scale is .* \(\)"):
        NVFP4Weight(good.packed, good.block_scale, good.global_scale[0])
