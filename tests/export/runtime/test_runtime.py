"""Layers of the runtime against compressed-tensors and exact integers; merged and cut layers against whole ones."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import Tensor, nn

from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.runtime import CompressedLinear, CompressedTensorsConfig, CompressedTensorsWNA16Scheme
from amaxbridge.export.runtime.activations import activation_for, quantize_int8
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.schemes.signature import Arguments, Signature
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.mappings.errors import CheckpointError
from tests.support.runtime_layers import (
    layer_of,
    load,
    method_of,
    quantized_layer,
    random_inputs,
    random_weight,
    written,
)

every_scheme = pytest.mark.parametrize("name", SCHEMES)
SIZES = {"q": 128, "k": 256, "v": 256}
"""Outputs of merged modules: the square blocks of FP8 divide them, for two ranks too but in q."""


def their_scheme(name: str) -> QuantizationScheme:
    return QuantizationScheme.model_validate({"targets": ["Linear"], **SCHEMES[name].config_group})


def decompressed(name: str, tensors: dict[str, Tensor]) -> Tensor:
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(SCHEMES[name].config_group["format"])
    return compressor.decompress(dict(tensors), their_scheme(name))["weight"].bfloat16()


# Weights


@every_scheme
@pytest.mark.parametrize("shape", [(192, 256), (40, 128)], ids=["fits Marlin", "does not"])
def test_a_layer_holds_what_compressed_tensors_reads(name: str, shape: tuple[int, int]) -> None:
    layer, tensors = quantized_layer(name, random_weight(*shape))
    assert torch.equal(layer.dequantized(), decompressed(name, tensors))


@every_scheme
def test_a_layer_computes_what_transformers_would(name: str) -> None:
    """Inputs are rounded as compressed-tensors' forward does, but in fp32: codes at a tie may differ."""
    layer, tensors = quantized_layer(name, random_weight(64, 256), bias=torch.linspace(-1, 1, 64).bfloat16())
    x = random_inputs(256).reshape(1, 5, 256)
    inputs = x
    scheme = their_scheme(name)
    if scheme.input_activations is not None:
        module = nn.Module()
        module.quantization_status = QuantizationStatus.COMPRESSED
        for scale in ("input_scale", "input_global_scale"):
            if scale in tensors:
                setattr(module, scale, tensors[scale])
        inputs = forward_quantize(module, x, "input", scheme.input_activations)
    expected = nn.functional.linear(inputs.to(x.dtype), decompressed(name, tensors), layer.bias)
    found = layer(x)
    assert found.dtype == torch.bfloat16 and found.shape == (1, 5, 64)
    if scheme.input_activations is None or "mx" in name or name == "fp8":
        assert torch.equal(found, expected)
    else:
        assert (found.float() - expected.float()).norm() / expected.float().norm() < 0.02


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_of_any_group_size(group_size: int, bits: int, symmetric: bool) -> None:
    """Group size -1, one scale for a row, was broken in the program this replaces."""
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    weight = random_weight(64, 256)
    groups = 1 if group_size == -1 else 256 // group_size
    state: dict[str, Any] = {"weight": weight, "weight_scale": torch.rand(64, groups).bfloat16() / 50 + 0.01}
    if not symmetric:
        limit = 2 ** (bits - 1)
        state["weight_zero_point"] = torch.randint(-limit, limit, (64, groups), dtype=torch.int8)
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = dict(compressor.compress(state, scheme))
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = CompressedTensorsConfig.from_config({"format": "pack-quantized", "config_groups": {"group_0": group}})
    method = config.get_quant_method(nn.Linear(1, 1), "m")
    assert method is not None
    layer = layer_of(method, [tensors], [(64, 256)])
    expected = compressor.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(layer.dequantized(), expected.bfloat16())


def test_columns_that_do_not_fill_a_word() -> None:
    tensors = written(w4a16(12), {"m": random_weight(20, 36)})["m"]
    layer = layer_of(method_of(w4a16(12)), [tensors], [(20, 36)])
    expected = w4a16(12).dequantize(tensors)
    assert torch.equal(layer.dequantized(), expected)


@pytest.mark.parametrize("tp_rank", [None, 0, 1])
@pytest.mark.parametrize("shape", [(64, 256), (24, 256)], ids=["fits Marlin", "does not"])
def test_act_order(shape: tuple[int, int], tp_rank: int | None) -> None:
    """Each input has its own group; on a rank, with the scales of all groups."""
    tensors = written(w4a16(32), {"m": random_weight(*shape)})["m"]
    groups = torch.randperm(256, generator=torch.Generator().manual_seed(1)) // 32
    tensors["weight_g_idx"] = groups.int()
    scheme = CompressedTensorsWNA16Scheme(weight_bits=4, group_size=32, symmetric=True, actorder="group")
    plain = w4a16(32).dequantize(tensors)
    scale = tensors["weight_scale"].float()
    codes = (plain.float() / scale.repeat_interleave(32, 1)).round()
    expected = (codes * scale[:, groups]).bfloat16()
    columns, layer = 256 if tp_rank is None else 128, nn.Module()
    scheme.create_weights(layer, columns, [shape[0]], 256, shape[0], torch.bfloat16, tp_rank=tp_rank or 0)
    load(layer, tensors)
    scheme.process_weights_after_loading(layer)
    part = expected if tp_rank is None else expected[:, tp_rank * 128 :][:, :128]
    assert torch.equal(scheme.weight(layer), part)
    x = random_inputs(columns)
    assert torch.equal(scheme.apply(layer, x), x @ part.T)


# Inputs


def test_int8_inputs_round_half_away_from_zero() -> None:
    x = torch.tensor([[127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, -126.5], [0.0] * 8])
    codes, scale = quantize_int8(x)
    assert codes.tolist() == [[127, 1, -1, 2, 3, -3, 0, -127], [0] * 8]
    assert torch.equal(scale, torch.tensor([[1.0], [torch.tensor(1e-10) / 127]]))


def test_w8a8_is_the_exact_integer_product() -> None:
    layer, tensors = quantized_layer("w8a8", random_weight(96, 200))
    x = random_inputs(200, tokens=17)
    codes, scale = quantize_int8(x)
    product = codes.long() @ tensors["weight"].long().T
    expected = (product.float() * scale * tensors["weight_scale"].float().T).bfloat16()
    assert torch.equal(layer(x), expected)
    absmax = x.float().abs().amax(1, keepdim=True)
    assert torch.equal(scale, absmax / torch.full_like(absmax, 127))
    assert (codes.float() * scale - x.float()).abs().max() <= scale.max() * 0.5001


def test_nvfp4_inputs_are_what_training_computed() -> None:
    """ModelOpt's arithmetic under the amax that the stored divisor came from."""
    amax = torch.tensor(2.625)  # of which the divisor's reciprocal is exact
    divisor = nvfp4.input_global_scale(amax)
    signature = Signature(
        "nvfp4-pack-quantized", NVFP4_BLOCKS, Arguments(4, "float", "tensor_group", "local", True, 16)
    )
    activation = activation_for(signature)
    assert activation is not None
    x = random_inputs(64, tokens=40)
    expected = nvfp4.dequantize(nvfp4.quantize(x, amax, arithmetic=Arithmetic.MODELOPT))
    assert torch.equal(activation.round(x, divisor), expected)


NVFP4_BLOCKS = Arguments(4, "float", "tensor_group", False, True, 16)


# Merged modules and ranks


@every_scheme
@pytest.mark.parametrize(("tp_size", "tp_dim"), [(1, 0), (2, 0), (2, 1)])
def test_merged_and_cut_is_the_whole(name: str, tp_size: int, tp_dim: int) -> None:
    """q, k and v loaded by shard id, on each rank, against every module by itself."""
    sizes = {shard: rows * (2 if shard == "q" else 1) for shard, rows in SIZES.items()}
    weights = {shard: random_weight(rows, 256, seed=rows) for shard, rows in sizes.items()}
    parts = written(SCHEMES[name], weights)
    method = method_of(SCHEMES[name], "a.qkv_proj")
    alone = {shard: layer_of(method, [part], [(sizes[shard], 256)]).dequantized() for shard, part in parts.items()}
    for rank in range(tp_size):
        layer = CompressedLinear(method, 256, list(sizes.values()), tp_rank=rank, tp_size=tp_size, tp_dim=tp_dim)
        for shard, tensors in parts.items():
            load(layer, tensors, shard)
        method.process_weights_after_loading(layer)
        expected = torch.cat([weight.chunk(tp_size, tp_dim)[rank] for weight in alone.values()])
        assert torch.equal(layer.dequantized(), expected)
        assert layer(random_inputs(layer.in_features)).shape == (5, len(expected))


@every_scheme
def test_modules_that_are_merged_on_disk_are_split(name: str) -> None:
    """Phi-3 stores merged modules in one tensor, which is loaded without a shard id."""
    weights = {shard: random_weight(256, 128, seed=seed) for seed, shard in enumerate("gu")}
    merged = written(SCHEMES[name], {"m": torch.cat(list(weights.values()))})["m"]
    layer = CompressedLinear(method_of(SCHEMES[name]), 128, [256, 256], tp_rank=1, tp_size=2)
    load(layer, merged)
    layer.method.process_weights_after_loading(layer)
    expected = decompressed(name, merged).reshape(2, 2, 128, 128)[:, 1].reshape(256, 128)
    assert torch.equal(layer.dequantized(), expected)


def test_ranks_share_key_and_value_heads() -> None:
    """Four ranks, two heads of keys: ranks 2 and 3 hold the second."""
    weights = {"q": random_weight(64, 64), "k": random_weight(32, 64, seed=1), "v": random_weight(32, 64, seed=2)}
    parts = written(SCHEMES["fp8_dynamic"], weights)
    method = method_of(SCHEMES["fp8_dynamic"])
    layer = nn.Module()
    method.create_weights(layer, 64, [16, 16, 16], 64, 192, torch.bfloat16, tp_rank=3, tp_size=4)
    for shard, tensors in parts.items():
        load(layer, tensors, shard)
    method.process_weights_after_loading(layer)
    expected = [decompressed("fp8_dynamic", part)[-16:] for part in parts.values()]
    assert torch.equal(method.scheme.weight(layer), torch.cat(expected))


# What is refused


@pytest.mark.parametrize("number", ["weight_global_scale", "input_global_scale"])
def test_global_scales_of_merged_modules_that_differ_are_an_error(number: str) -> None:
    parts = written(SCHEMES["nvfp4"], {"q": random_weight(32, 64), "k": random_weight(32, 64, seed=1)})
    parts["k"][number] = parts["k"][number] * 2
    with pytest.raises(CheckpointError, match=rf"m: {number} differs .*\n  module 0: \[.*\n  module 1: \["):
        layer_of(method_of(SCHEMES["nvfp4"]), list(parts.values()), [(32, 64), (32, 64)])


def test_fp8_weight_scales_may_differ_between_merged_modules() -> None:
    weights = [random_weight(32, 64), random_weight(32, 64, seed=1) * 7]
    parts = [written(SCHEMES["fp8"], {"m": weight})["m"] for weight in weights]
    parts[1]["weight_scale"] = parts[1]["weight_scale"] * 7
    layer = layer_of(method_of(SCHEMES["fp8"]), parts, [(32, 64), (32, 64)])
    assert torch.equal(layer.dequantized(), torch.cat([decompressed("fp8", part) for part in parts]))


def test_what_was_never_loaded_is_named() -> None:
    parts = written(SCHEMES["nvfp4a16"], {"q": random_weight(32, 64), "k": random_weight(32, 64)})
    del parts["k"]["weight_scale"], parts["q"]["weight_packed"]
    expected = r"m: 2 tensors were never loaded:\n  weight_packed of module 0\n  weight_scale of module 1"
    with pytest.raises(CheckpointError, match=expected):
        layer_of(method_of(SCHEMES["nvfp4a16"]), list(parts.values()), [(32, 64), (32, 64)])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_scale", torch.zeros(32, 4, dtype=torch.uint8), "has .* uint8, the layer needs .* float8_e4m3fn"),
        ("weight_packed", torch.zeros(64, 32).byte(), r"has \[64, 32\] .* needs \[32, 32\] uint8 on rank 0 of 1"),
        ("weight_global_scale", torch.ones(2), r"has \[2\] float32, the layer needs \[1\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(name: str, tensor: Tensor, message: str) -> None:
    """An engine casts and broadcasts them in silence."""
    layer = CompressedLinear(method_of(SCHEMES["nvfp4"]), 64, [32])
    with pytest.raises(CheckpointError, match=f"{name}: the checkpoint {message}"):
        load(layer, {name: tensor})
    with pytest.raises(CheckpointError, match="has 1 modules, and none is 'k'"):
        load(layer, {name: tensor}, "k")


@pytest.mark.parametrize(
    ("name", "columns", "rows", "options", "message"),
    [
        ("nvfp4a16", 40, [16], {}, "NVFP4 needs .* divisible by 16"),
        ("w4a16", 256, [64], {"tp_size": 4, "tp_dim": 1}, "inputs = 64 does not divide by 128 on rank 0 of 4"),
        ("w4a16_asym", 128, [20, 20], {}, "outputs = 20 does not divide by 8"),
        ("fp8_block", 256, [192, 128], {}, r"blocks of 128 do not divide outputs \[192, 128\]"),
        ("fp8_block", 256, [256], {"tp_size": 4}, "use fewer ranks"),
        ("fp8_block", 192, [128], {"tp_size": 2, "tp_dim": 1}, "inputs 96 of rank 0 of 2"),
    ],
)
def test_sizes_that_do_not_divide(
    name: str, columns: int, rows: list[int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"m: .*{message}"):
        CompressedLinear(method_of(SCHEMES[name]), columns, rows, **options)
