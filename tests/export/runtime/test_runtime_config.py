"""Which method a layer gets: matching, fused layers, signatures that nothing computes."""

from typing import Any

import pytest
import torch
from compressed_tensors.utils import match_name
from torch import nn

from amaxbridge.export.architectures.engines import RUNTIME, Layer, fused_name, members_of, read_layer
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.quant_config import QuantConfig, read_quant_config
from amaxbridge.export.runtime import (
    CompressedTensorsConfig,
    CompressedTensorsW8A8Int8Scheme,
    CompressedTensorsWNA16Scheme,
    UnsupportedQuantizationError,
)
from amaxbridge.export.runtime.float_formats import FloatScheme
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.mappings.errors import CheckpointError

LINEAR = nn.Linear(1, 1)
W4A16: dict[str, Any] = {
    "quant_format": "pack-quantized",
    "weight_bits": 4,
    "group_size": 128,
    "weight_strategy": "group",
}
INT8: dict[str, Any] = {
    "quant_format": "int-quantized", "weight_bits": 8, "weight_strategy": "channel",
    "input_bits": 8, "input_strategy": "token", "input_type": "int", "input_dynamic": True,
}  # fmt: skip


def method(config: CompressedTensorsConfig, name: str, layer: nn.Module = LINEAR) -> Any:
    found = config.get_quant_method(layer, name)
    return None if found is None else found.scheme


# Matching


@pytest.mark.parametrize(
    ("ignore", "ignored", "quantized"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj"),
        (r"re:model\.layers\.1\..*", "model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj"),
        ("re:.*down_proj$", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.x"),
        ("re:layers", "layers.0.x", "model.layers.0.x"),
        ("lm_head", "lm_head", "model.lm_head"),
    ],
)
def test_ignore_means_whole_names(ignore: str, ignored: str, quantized: str) -> None:
    config = CompressedTensorsConfig(ignore=[ignore], **W4A16)
    assert config.get_quant_method(LINEAR, ignored) is None
    assert config.get_quant_method(LINEAR, quantized) is not None
    for name in (ignored, quantized):
        is_ignored = QuantConfig(ignore=(ignore,)).ignored_by(name) is not None
        assert is_ignored == match_name(name, ignore)  # of compressed-tensors


def test_a_fused_layer_is_ignored_whole_or_not_at_all() -> None:
    every = [f"a.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert CompressedTensorsConfig(ignore=every, **W4A16).get_quant_method(LINEAR, "a.qkv_proj") is None
    assert CompressedTensorsConfig(ignore=["a.qkv_proj"], **W4A16).get_quant_method(LINEAR, "a.qkv_proj") is None
    for part in (every[:1], every[:2], ["re:.*k_proj"]):
        config = CompressedTensorsConfig(ignore=part, **W4A16)
        with pytest.raises(CheckpointError, match=r"a.qkv_proj runs as one layer(.|\n)*a.v_proj: group_0\nGive all"):
            config.get_quant_method(LINEAR, "a.qkv_proj")
        assert config.get_quant_method(LINEAR, "a.v_proj") is not None
    with pytest.raises(CheckpointError, match=r"gate_proj: group_0\n.*up_proj: not quantized"):
        CompressedTensorsConfig(ignore=["re:.*up_proj"], **W4A16).get_quant_method(LINEAR, "mlp.gate_up_proj")


def test_fused_layers_are_those_of_the_one_table() -> None:
    assert members_of("a.qkv_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert members_of("a.fused_qkv_a_proj") == ("a.q_a_proj", "a.kv_a_proj_with_mqa")
    assert members_of("a.o_proj") == ("a.o_proj",)
    for name in ("a.qkv_proj", "mlp.gate_up_proj", "w13", "a.in_proj_qkvz", "a.in_proj_ba"):
        assert {fused_name(member) for member in members_of(name)} == {name}
    assert fused_name("a.o_proj") == "a.o_proj"


def test_several_groups() -> None:
    schemes = {"l.0.q_proj": SCHEMES["w4a16"], "l.0.o_proj": SCHEMES["w8a8"], "l.0.down_proj": SCHEMES["nvfp4"]}
    raw = quantization_config(schemes, ["l.0.up_proj"])
    assert raw["format"] == "mixed-precision"
    config = CompressedTensorsConfig.from_config(raw)
    assert isinstance(method(config, "l.3.q_proj"), CompressedTensorsWNA16Scheme)
    assert isinstance(method(config, "l.0.o_proj"), CompressedTensorsW8A8Int8Scheme)
    assert isinstance(method(config, "l.0.down_proj"), FloatScheme)
    assert method(config, "l.0.up_proj") is None
    assert config.quant_config.groups_of("l.0.gate_proj") == [] and method(config, "l.0.gate_proj") is None
    with pytest.raises(
        CheckpointError, match=r"qkv_proj runs as one layer(.|\n)*q_proj: group_0\n.*k_proj: not quantized"
    ):
        config.get_quant_method(LINEAR, "l.0.qkv_proj")


def test_a_name_goes_before_a_class() -> None:
    group = SCHEMES["fp8_dynamic"].config_group
    groups = {"group_0": {**group, "targets": ["Linear"]}, "group_1": {**group, "targets": [r"re:.*down_proj$"]}}
    config = read_quant_config({"config_groups": groups})
    assert config.groups_of("a.down_proj") == [0, 1]
    for name, expected in (("a.down_proj", 1), ("a.up_proj", 0)):
        assert config.group_of(name) == read_layer(RUNTIME, Layer.named(name), config).group == expected


def test_classes_of_layers() -> None:
    class ColumnParallelLinear(nn.Module):
        """A layer class with the name that engines give theirs."""

    config = CompressedTensorsConfig(**W4A16)
    assert method(config, "m", ColumnParallelLinear()) is not None
    assert method(config, "m", nn.Embedding(1, 1)) is None
    assert method(CompressedTensorsConfig(ignore=["Linear"], **W4A16), "m") is None


# Configs


def test_what_engines_ask_of_a_config() -> None:
    config = CompressedTensorsConfig(ignore=["lm_head"], **INT8)
    assert config.get_name() == "compressed-tensors"
    assert torch.bfloat16 in config.get_supported_act_dtypes()
    assert config.get_min_capability() == 75 and config.get_config_filenames() == ["config.json"]
    assert config.ignore == ["lm_head"]


@pytest.mark.parametrize("name", SCHEMES)
def test_keywords_say_what_a_config_says(name: str) -> None:
    group = SCHEMES[name].config_group
    inputs = group["input_activations"] or {}
    weights = group["weights"]
    by_keywords = CompressedTensorsConfig(
        quant_format=group["format"], ignore=[], weight_bits=weights["num_bits"], group_size=weights.get("group_size"),
        weight_strategy=weights["strategy"], weight_type=weights["type"], weight_dynamic=False,
        symmetric=weights["symmetric"], actorder=None, input_bits=inputs.get("num_bits"),
        input_strategy=inputs.get("strategy"), input_type=inputs.get("type"), input_dynamic=inputs.get("dynamic"),
        input_symmetric=inputs.get("symmetric"),
    )  # fmt: skip
    read = CompressedTensorsConfig.from_config(quantization_config({"m": SCHEMES[name]}, []))
    assert by_keywords.signatures == read.signatures
    assert method(read, "m") is not None


@pytest.mark.parametrize("size", [-1, None])
def test_no_group_size_is_one_scale_for_a_row(size: int | None) -> None:
    for strategy in ("group", "channel"):
        config = CompressedTensorsConfig(**{**W4A16, "group_size": size, "weight_strategy": strategy})
        assert method(config, "m").group_size == -1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({**W4A16, "weight_bits": 3}, "m: packed integers of 3 bits are not supported; 4 and 8 are"),
        ({**W4A16, "actorder": "sideways"}, "actorder='sideways' is not supported"),
        ({**W4A16, "quant_format": "int-quantized"}, "integer weights alone are read as pack-quantized"),
        ({**W4A16, "weight_strategy": "tensor"}, "packed integers are by group or by channel"),
        ({**W4A16, "weight_dynamic": True}, "weights with dynamic scales are not in a checkpoint"),
        ({**W4A16, "weight_type": "bool"}, "weights are int or float, not bool"),
        ({**INT8, "input_dynamic": False}, "inputs of 8-bit integers, dynamic by token"),
        ({**INT8, "input_strategy": "tensor"}, "inputs of 8-bit integers, dynamic by token"),
        ({**INT8, "input_symmetric": False}, "int8 by token, dynamic=True, asymmetric"),
        ({**INT8, "input_bits": 4}, "inputs of 8-bit integers"),
        ({**INT8, "weight_bits": 4}, "4-bit weights with integer inputs|integer weights of 4 bits"),
        ({**INT8, "weight_strategy": "group", "group_size": 64}, "by channel or"),
        ({**INT8, "weight_type": "float"}, "these inputs are not supported beside these weights"),
        (
            {**INT8, "weight_type": "float", "input_type": "float", "weight_bits": 6},
            "these inputs are not|these weights",
        ),
        ({**W4A16, "weight_type": "float", "group_size": 64}, "these weights are not supported.*NVFP4"),
    ],
)
def test_signatures_that_nothing_computes(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedQuantizationError, match=message):
        CompressedTensorsConfig(**keywords).get_quant_method(LINEAR, "m")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is gptq"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
        ({"config_groups": {}, "transform_config": {"config_groups": {"R1": {}}}}, "has transform_config"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}}, "without weights"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int"}}}}, "without num_bits"),
    ],
)
def test_configs_that_are_none(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedQuantizationError, match=message):
        CompressedTensorsConfig.from_config(config)
