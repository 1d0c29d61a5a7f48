"""The one reader of `quantization_config`: against compressed-tensors, and all its users against one another."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, preset_name_to_scheme
from torch import nn

from amaxbridge.export.architectures.engines import ENGINES, RUNTIME, Layer, read_layer
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.quant_config import read_quant_config
from amaxbridge.export.runtime import CompressedTensorsConfig, UnsupportedQuantizationError
from amaxbridge.export.schemes import SCHEMES, Scheme, find_scheme
from amaxbridge.export.schemes.signature import Arguments
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.mappings.errors import UsageError

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)


def config_of(weights: dict[str, Any], quant_format: str = "pack-quantized", **others: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": quant_format, **others}
    return {"quant_method": "compressed-tensors", "format": quant_format, "config_groups": {"group_0": group}}


# Against compressed-tensors


ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"group_size": 128},
    {"group_size": -1},
    {"strategy": "channel"},
    {"group_size": -1, "strategy": "channel"},
    {"group_size": -1, "strategy": "group"},
    {"group_size": 32, "strategy": "group"},
    {"group_size": 32, "strategy": "GROUP"},
    {"strategy": "group"},
    {"strategy": "channel", "group_size": 128},
    {"group_size": 0},
    {"group_size": -2},
    {"strategy": "tensor"},
    {},
    {"strategy": "tensor_group", "group_size": 16},
    {"strategy": "tensor_group"},
    {"strategy": "block", "block_structure": [128, 128]},
    {"strategy": "block", "block_structure": "128x128"},
    {"strategy": "block"},
    {"block_structure": [128, 128]},
    {"strategy": "block", "block_structure": [128, 0]},
    {"group_size": 32, "actorder": "static"},
    {"group_size": 32, "actorder": "weight"},
    {"group_size": 32, "actorder": False},
    {"group_size": 32, "more": 1},
    {"strategy": "token", "dynamic": True},
    {"strategy": "token"},
    {"strategy": "channel", "dynamic": True},
    {"strategy": "group", "group_size": 16, "dynamic": "local"},
    {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    {"strategy": "sideways"},
    {"type": "INT"},
    {"type": "bool"},
)


@pytest.mark.parametrize("more", ARGUMENTS, ids=str)
def test_arguments_are_read_as_compressed_tensors_reads_them(more: dict[str, Any]) -> None:
    args = {"num_bits": 4, "type": "int", "symmetric": True, **more}
    try:
        theirs = QuantizationArgs(**args)
    except ValueError:
        with pytest.raises(UnsupportedQuantizationError):
            Arguments.of(args)
        return
    ours = Arguments.of(args)
    assert ours.strategy == str(getattr(theirs.strategy, "value", theirs.strategy))
    assert ours.group_size == (None if theirs.group_size == -1 else theirs.group_size)
    assert ours.block_structure == (None if theirs.block_structure is None else tuple(theirs.block_structure))
    assert (ours.bits, ours.kind, ours.symmetric, ours.dynamic) == (4, "int", True, theirs.dynamic)


@every_scheme
def test_what_compressed_tensors_writes_is_read(scheme: Scheme) -> None:
    """compressed-tensors' own serialization has additional keys, some null, and lacks others."""
    ours = quantization_config({"m": scheme}, ["lm_head"])
    theirs = QuantizationConfig.model_validate(ours).model_dump(mode="json")
    assert theirs.keys() > {"config_groups", "ignore", "format"}
    for raw in (ours, theirs):
        config = read_quant_config(raw).checked()
        assert [group.scheme for group in config.groups] == [scheme]
        assert config.ignore == ("lm_head",)


@every_scheme
def test_presets_are_read(scheme: Scheme) -> None:
    preset = preset_name_to_scheme(scheme.name.upper(), ["Linear"]).model_dump(mode="json")
    read = read_quant_config({"config_groups": {"group_0": {**preset, "format": scheme.config_group["format"]}}})
    assert read.checked().scheme_of("m") == scheme


# All users see the same


@pytest.mark.parametrize(
    ("more", "size"),
    [
        ({"group_size": 128}, 128),
        ({"group_size": -1}, -1),
        ({"strategy": "channel"}, -1),
        ({"group_size": 32, "strategy": "group"}, 32),
        ({"group_size": 64, "actorder": "weight"}, 64),
        ({"group_size": -1, "strategy": "group"}, None),
        ({"strategy": "tensor"}, None),
    ],
    ids=str,
)
def test_the_readers_agree(more: dict[str, Any], size: int | None) -> None:
    """The runtime, the import and `find_scheme` on one group; what compressed-tensors refuses, all refuse."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, **more}
    raw = config_of(weights)
    config = read_quant_config(raw)
    if size is None:
        assert config.groups[0].scheme is None
        with pytest.raises(UnsupportedQuantizationError):
            CompressedTensorsConfig.from_config(raw).get_quant_method(nn.Linear(1, 1), "m")
        return
    assert config.checked().scheme_of("m") == w4a16(size)
    method = CompressedTensorsConfig.from_config(raw).get_quant_method(nn.Linear(1, 1), "m")
    assert method is not None and method.scheme.group_size == size  # type: ignore[attr-defined]
    theirs = preset_name_to_scheme("W4A16", ["Linear"])
    theirs.weights = QuantizationArgs(**weights)
    found: Any = find_scheme(theirs)
    assert found.groups[0].scheme == w4a16(size)


@every_scheme
@pytest.mark.parametrize("layer", ["l.qkv_proj", "l.o_proj", "l.mlp.gate_up_proj"])
def test_engines_agree_on_a_sound_config(scheme: Scheme, layer: str) -> None:
    config = read_quant_config(quantization_config({"m": scheme}, ["lm_head", "l.router"])).checked()
    assert {engine.name: read_layer(engine, Layer.named(layer), config).group for engine in (*ENGINES, RUNTIME)} == {
        engine.name: 0 for engine in (*ENGINES, RUNTIME)
    }
    for engine in (*ENGINES, RUNTIME):
        assert read_layer(engine, Layer.named("lm_head"), config).group is None


# What is not understood is refused by name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is gptq, not compressed-tensors, modelopt"),
        ({"quant_method": "modelopt"}, "quant_algo is missing; known: NVFP4, W4A16_NVFP4"),
        ({"rotation": "hadamard"}, "rotation is an unknown key"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "quantization_config has transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "has sparsity_config"),
        ({"moe_sparsity_config": {"experts": 4}}, "has moe_sparsity_config"),
        ({"config_groups": ["group_0"]}, "config_groups is not an object"),
        ({"config_groups": {"group_0": "Linear"}}, "config_groups.group_0 is not an object"),
        ({"kv_cache_scheme": {"num_bits": 8, "zero": 1}}, "kv_cache_scheme.zero is an unknown key"),
        ({"kv_cache_scheme": {"type": "float"}}, "kv_cache_scheme is malformed: .*without num_bits"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    raw = config_of({"num_bits": 4, "group_size": 128})
    assert read_quant_config(raw).checked().groups
    with pytest.raises(UnsupportedQuantizationError, match=message):
        read_quant_config({**raw, **change}).checked()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"num_bits": 4, "group_size": 128, "codebook": "nf4"}}, "group_0.weights.codebook is an unknown"),
        ({"output_activations": {"num_bits": 8}}, "group_0 is malformed: output_activations"),
        ({"rounding": "stochastic"}, "group_0.rounding is an unknown key"),
        ({"weights": None}, "group_0 is malformed: a config group without weights"),
    ],
    ids=str,
)
def test_what_is_not_understood_in_a_group_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    raw = config_of({"num_bits": 4, "group_size": 128})
    raw["config_groups"]["group_0"] |= change
    with pytest.raises(UnsupportedQuantizationError, match=message):
        read_quant_config(raw).checked()


@pytest.mark.parametrize(
    "change",
    [
        {"moe_sparsity_config": None, "transform_config": {}, "sparsity_config": {"format": "dense"}},
        {"version": "0.20.1", "global_compression_ratio": 1.5, "quantization_status": "compressed"},
        {"anything_new": None},
    ],
    ids=str,
)
def test_keys_without_a_meaning_are_passed_over(change: dict[str, Any]) -> None:
    raw = config_of({"num_bits": 4, "group_size": 128, "observer": "mse", "observer_kwargs": {"a": 1}})
    assert read_quant_config({**raw, **change}).checked().scheme_of("m") == w4a16(128)


def test_a_checkpoint_without_quantization() -> None:
    for raw in (None, {}):
        config = read_quant_config(raw).checked()
        assert not config.groups and config.scheme_of("m") is None


@pytest.mark.parametrize("targets", [("re:(",), ("Linear", "re:[")])
def test_patterns_that_do_not_compile_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"1 targets are not valid regular expressions:\n  re:"):
        find_scheme("w8a8", targets)
    assert torch.get_default_dtype() == torch.float32
