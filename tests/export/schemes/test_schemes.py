"""Every scheme against what defines it: llm-compressor's files, compressed-tensors and ModelOpt run here."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor
from modelopt.torch.quantization.tensor_quant import _fp8_eager, _tensor_quant
from safetensors.torch import load_file
from torch import Tensor

from amaxbridge.export.amax.cache_scales import PER_TENSOR
from amaxbridge.export.amax.fused_group_amax import DATA_FREE, BlockAmax, GroupAmax
from amaxbridge.export.disk.packed_experts import split_fused_moe_experts
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import unpack_codes
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.output.finalizer import Bundle, Finalizer
from amaxbridge.export.schemes import SCHEMES, Groups, SchemeGroup, find_scheme, named_scheme
from amaxbridge.export.schemes.packed_integers import GROUP_SIZES
from amaxbridge.export.schemes.scheme import quantize_tensors
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.hard_weights import WEIGHTS, all_dtypes, of_module, random_weight, same_bytes, weights_of_all_kinds
from tests.support.paths import GOLDEN

PEER_BYTES = load_file(GOLDEN / "schemes_llmcompressor.safetensors")
LABELS = ("bf16", "fp32", "fp16")
PEERS = ("NVFP4A16", "MXFP4", "MXFP8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W8A8")
OVERFLOWS = ("fp16", "NVFP4A16")  # in the peer, see test_nvfp4
PLAIN = (*(name for name in PEERS if name != "NVFP4A16"), "W8A16", "W4AFP8")  # of one weight, without a group

every_scheme = pytest.mark.parametrize("name", SCHEMES)


def golden(label: str, part: str) -> dict[str, Tensor]:
    prefix = f"{label}/{part}/"
    return {name.removeprefix(prefix): tensor for name, tensor in PEER_BYTES.items() if name.startswith(prefix)}


def quantized(name: str, weight: Tensor, amax: GroupAmax | None = None, **options: Any) -> dict[str, Tensor]:
    """The tensors that the scheme writes for one module `m`, by the names after `m.`."""
    written = quantize_tensors(SCHEMES[name], {"m": weight}, amax, **options)
    return {name.removeprefix("m."): tensor for name, tensor in written}


def compressed_tensors_quantize(preset: str, weight: Tensor, group_size: int | None = None) -> dict[str, Tensor]:
    """Does with compressed-tensors' own functions what llm-compressor does between weight and file."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    args.group_size = group_size or args.group_size
    height, width = args.block_structure or (1, args.group_size or weight.shape[1])
    missing = (0, -weight.shape[1] % width, 0, -weight.shape[0] % height)
    padded = torch.nn.functional.pad(weight, missing)
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scale, zero_point = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    state = {"weight": weight, "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero_point
    return dict(compressor(preset).compress(state, scheme))


def compressor(preset: str) -> type[BaseCompressor]:
    found: type[BaseCompressor] = BaseCompressor.get_value_from_registry(SCHEMES[preset.lower()].config_group["format"])
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and same_bytes(found[name], tensor), name


# llm-compressor and compressed-tensors


@pytest.mark.parametrize(("label", "preset"), [pair for pair in product(LABELS, PEERS) if pair != OVERFLOWS])
def test_files_are_those_that_llm_compressor_wrote(label: str, preset: str) -> None:
    """Through the finalizer, dense and MoE."""
    tensors = split_fused_moe_experts(golden(label, "in"))
    finalizer = Finalizer({name: TensorSpec.of(t) for name, t in tensors.items()}, find_scheme(preset), None)
    written = dict(finalizer.finalize(Bundle.of(tensors)))
    assert_same(written, golden(label, preset))
    assert {name: TensorSpec.of(tensor) for name, tensor in written.items()} == finalizer.output_specs


@weights_of_all_kinds
@all_dtypes
@pytest.mark.parametrize("preset", PLAIN)
def test_bytes_are_compressed_tensors_own(preset: str, dtype: torch.dtype, kind: str) -> None:
    weight = fitting(WEIGHTS[kind]()).to(dtype)
    assert_same(quantized(preset.lower(), weight), compressed_tensors_quantize(preset, weight))


def fitting(weight: Tensor) -> Tensor:
    """The weight with its columns repeated up to 256, which every group size divides."""
    return weight.repeat(1, -(-256 // weight.shape[1]))[:, :256]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A16"])
@pytest.mark.parametrize("columns", [576, 96, 384])
def test_bytes_in_groups_of_every_size(columns: int, preset: str, group_size: int) -> None:
    """576 is the width of SmolLM2-135M, which 128 does not divide; 96 leaves 32 alone."""
    scheme = named_scheme(preset, group_size)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = random_weight(40, columns).to(dtype)
        if columns % group_size:
            fits = max(size for size in GROUP_SIZES if columns % size == 0)
            with pytest.raises(ValueError, match=rf"{preset.lower()} needs .*; give scheme\.group_size={fits}$"):
                scheme.tensor_specs(TensorSpec.of(weight), Arithmetic.COMPRESSED_TENSORS)
            continue
        tensors = of_module("m", dict(quantize_tensors(scheme, {"m": weight})))
        specs = scheme.tensor_specs(TensorSpec.of(weight), Arithmetic.COMPRESSED_TENSORS)
        assert {name: TensorSpec.of(tensor) for name, tensor in tensors.items()} == specs
        assert_same(tensors, compressed_tensors_quantize(preset, weight, group_size))
        parsed = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme.config_group})
        expected = compressor(preset).decompress(dict(tensors), parsed)["weight"]
        torch.testing.assert_close(scheme.dequantize(tensors).to(dtype), expected, rtol=2**-8, atol=0)
        assert dtype != torch.bfloat16 or torch.equal(scheme.dequantize(tensors), expected)


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_bytes_in_whole_rows(preset: str) -> None:
    """compressed-tensors says `channel`, and packs words that columns need not fill."""
    weight = random_weight(40, 100).bfloat16()
    theirs = preset_name_to_scheme(preset, ["Linear"])
    args = {**theirs.weights.model_dump(), "strategy": "channel", "group_size": None}
    theirs.weights = QuantizationArgs(**args)
    scale, zero_point = calculate_qparams(
        weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0), theirs.weights
    )
    state = {"weight": weight, "weight_scale": scale}
    if not theirs.weights.symmetric:
        state["weight_zero_point"] = zero_point
    expected = dict(compressor(preset).compress(state, theirs))
    scheme = SCHEMES[preset.lower()].with_group_size(-1)
    assert scheme is not None and find_scheme(theirs) == Groups.of(scheme)
    tensors = of_module("m", dict(quantize_tensors(scheme, {"m": weight})))
    assert_same(tensors, expected)
    assert torch.equal(scheme.dequantize(tensors), compressor(preset).decompress(dict(expected), theirs)["weight"])


@pytest.mark.parametrize("shape", [(8, 40), (64,), (2, 8, 64)])
def test_a_shape_that_no_group_size_fits_gets_no_advice(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"not \[[\d, ]+\]$"):
        SCHEMES["w4a16"].tensor_specs(TensorSpec(shape, torch.bfloat16), Arithmetic.COMPRESSED_TENSORS)


def test_square_blocks_may_be_cut_short() -> None:
    weight = random_weight(200, 300).bfloat16()
    assert_same(quantized("fp8_block", weight), compressed_tensors_quantize("FP8_BLOCK", weight))


@pytest.mark.parametrize("preset", PLAIN)
def test_dequantize_is_compressed_tensors_decompress(preset: str) -> None:
    weight = random_weight(136, 256).bfloat16()
    tensors = quantized(preset.lower(), weight)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    expected = compressor(preset).decompress(dict(tensors), scheme)["weight"].bfloat16()
    found = SCHEMES[preset.lower()].dequantize(tensors)
    assert torch.equal(found, expected)
    assert float((found.float() - weight.float()).norm() / weight.float().norm()) < 0.15


@every_scheme
def test_config_is_compressed_tensors_preset(name: str) -> None:
    """The group says what the preset says, in fewer keys; NVFP4's `scale_dtype` is explained in its file."""
    group = QuantizationScheme.model_validate({"targets": ["Linear"], **SCHEMES[name].config_group})
    preset = preset_name_to_scheme(name, ["Linear"])
    for ours, theirs in ((group.weights, preset.weights), (group.input_activations, preset.input_activations)):
        assert (ours is None) == (theirs is None)
        for key in () if ours is None else ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
            assert getattr(ours, key) == getattr(theirs, key), key
        if ours is not None and name != "nvfp4" and name != "nvfp4a16":
            assert (ours.scale_dtype, ours.block_structure) == (theirs.scale_dtype, theirs.block_structure)


@every_scheme
def test_presets_are_found_by_name_and_by_object(name: str) -> None:
    preset = preset_name_to_scheme(name, ["re:.*mlp.*"])
    assert find_scheme(name.upper()) == Groups.of(SCHEMES[name])
    assert find_scheme(preset) == Groups((SchemeGroup(SCHEMES[name], ("re:.*mlp.*",)),))


def test_other_group_sizes_come_as_objects() -> None:
    assert find_scheme(Groups.of(named_scheme("w4a16", group_size=64))) == Groups.of(w4a16(64))
    preset = preset_name_to_scheme("W4A16", ["Linear"])
    preset.weights.group_size = 64
    assert find_scheme(preset) == Groups.of(w4a16(64))
    preset.weights.num_bits = 3
    with pytest.raises(UsageError, match=r"no scheme writes .*num_bits=3"):
        find_scheme(preset)
    assert find_scheme("int8") == find_scheme("w8a8")
    assert find_scheme("none") is None


# ModelOpt


@weights_of_all_kinds
@all_dtypes
@pytest.mark.parametrize("factor", [1.0, 0.3, 5.0], ids="amax x {}".format)
def test_fp8_codes_are_those_of_the_fake_quantizer(factor: float, dtype: torch.dtype, kind: str) -> None:
    weight = WEIGHTS[kind]().to(dtype)
    amax = weight.float().abs().max() * factor
    found = quantized("fp8", weight, GroupAmax(amax, torch.tensor(2.0)))
    codes = _fp8_eager(weight.float(), amax) / (1 / (448.0 / amax))
    assert torch.equal(found["weight"].float(), codes.to(torch.float8_e4m3fn).float())
    assert same_bytes(found["weight_scale"], (amax / 448).reshape(1))
    assert same_bytes(found["input_scale"], torch.tensor([2.0]) / 448)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_codes_at_ties_are_those_of_the_fake_quantizer(dtype: torch.dtype) -> None:
    """Its 448 / amax rounds twice: under amax 0.234375 it takes 0.087890625, 168 of 448, to 176, not to 160."""
    weight = torch.tensor([[0.087890625, -0.02197265625, 0.234375]]).to(dtype)
    amax = weight.float().abs().amax(1, keepdim=True)
    found = quantized("fp8_dynamic", weight, GroupAmax(None, None), block_amax={"m": BlockAmax(amax)})
    codes = _fp8_eager(weight.float(), amax) / (1 / (448.0 / amax))
    assert found["weight"].float().tolist() == codes.round().tolist() == [[176.0, -44.0, 448.0]]


@pytest.mark.parametrize(
    ("name", "bits", "blocks"), [("w8a8", 8, 1), *(("w4a16", 4, n) for n in (2, 4, 8)), ("w8a16", 8, 2)]
)
def test_integer_codes_are_those_of_the_fake_quantizer(name: str, bits: int, blocks: int) -> None:
    weight = random_weight(8, 256).bfloat16()
    amax = weight.float().unflatten(1, (blocks, -1)).abs().amax(-1) * 0.8
    spread = amax.repeat_interleave(256 // amax.shape[1], 1)
    bound = 2 ** (bits - 1) - 1
    values = _tensor_quant(weight.float(), spread, bits, narrow_range=False)
    scheme = named_scheme(name, 256 // blocks if blocks > 1 else None)
    found = dict(quantize_tensors(scheme, {"m": weight}, GroupAmax(None, None), block_amax={"m": BlockAmax(amax)}))
    codes = unpack_codes(found["m.weight_packed"], 256, bits) if blocks > 1 else found["m.weight"]
    assert torch.equal(codes.float(), (values * (bound / spread)).round())
    # The contract has bf16 scales beside packed integers: an engine would round others to it, unseen.
    assert same_bytes(found["m.weight_scale"], (amax / bound).to(torch.bfloat16 if blocks > 1 else torch.float32))


@weights_of_all_kinds
def test_mx_exponents_are_modelopts(kind: str) -> None:
    """Calibrated training has no amax for these; the state alone makes the arithmetic ModelOpt's."""
    weight = fitting(WEIGHTS[kind]()).bfloat16()
    none = GroupAmax(None, None)
    _, exponents = MXFP4QTensor.quantize(weight, 32)
    assert torch.equal(quantized("mxfp4", weight, none)["weight_scale"], exponents.view(len(weight), -1))
    expected = MXFP8QTensor.get_weights_scaling_factor(weight)
    assert torch.equal(quantized("mxfp8", weight, none)["weight_scale"], expected)


@pytest.mark.parametrize("amax", [0.0, 1e-40])
def test_an_amax_that_is_all_but_zero_gives_zeros(amax: float) -> None:
    """Where 448 / amax is infinite, 0 times it would be NaN."""
    weight = torch.tensor([[0.0, 1e-40, -0.0, 3e-41]]).bfloat16()
    for name in ("fp8", "fp8_dynamic", "w8a8"):
        found = quantized(name, weight, GroupAmax(torch.tensor(amax), torch.tensor(2.0)))
        assert not found["weight"].float().any(), name
        assert found["weight_scale"].item() == 1


# Structure


@every_scheme
@pytest.mark.parametrize("shape", [(4, 24), (32,), (2, 4, 256)])
def test_what_is_planned_is_written(name: str, shape: tuple[int, ...]) -> None:
    scheme = SCHEMES[name]
    for calibrated in (False, True):
        if (scheme.needs_input_amax and not calibrated) or (calibrated and not scheme.format):
            continue
        amax = GroupAmax(torch.tensor(0.1), torch.tensor(2.0)) if calibrated else None
        weight = random_weight(20, 256).bfloat16()
        arithmetic = DATA_FREE.arithmetic if amax is None else amax.arithmetic
        specs = scheme.tensor_specs(TensorSpec.of(weight), arithmetic)
        assert {key: TensorSpec.of(tensor) for key, tensor in quantized(name, weight, amax).items()} == specs
        if scheme.config_group["weights"]["strategy"] not in ("channel", "tensor", "block") or len(shape) != 2:
            with pytest.raises(ValueError, match="needs"):
                scheme.tensor_specs(TensorSpec(shape, torch.bfloat16), arithmetic)


def test_a_config_of_several_schemes() -> None:
    schemes = {"model.layers.0.a": SCHEMES["nvfp4"], "model.layers.1.a": SCHEMES["nvfp4"], "b": SCHEMES["w8a8"]}
    config = quantization_config(schemes, ["lm_head"], cache=PER_TENSOR)
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == config["format"] == "mixed-precision"
    assert [group.targets for group in parsed.config_groups.values()] == [[r"re:model\.layers\.\d+\.a$"], [r"re:b$"]]
    assert parsed.kv_cache_scheme.num_bits == 8
