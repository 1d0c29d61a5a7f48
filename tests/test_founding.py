"""The founding API: each name, with the arguments, attributes and meaning that it was founded with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from amaxbridge.export.runtime import (
    SCALAR_TYPE_UINT4,
    SCALAR_TYPE_UINT4B8,
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
    CompressedTensorsW8A8Int8Scheme,
    CompressedTensorsWNA16Scheme,
    UnsupportedQuantizationError,
)
from amaxbridge.export.runtime.activations import quantize_int8
from amaxbridge.mappings import (
    AmaxFanoutMapping,
    AmaxMapping,
    DirectMapping,
    MappingRegistry,
    MegatronMappingRegistry,
    MoeAmaxFanoutMapping,
    ReplicatedMapping,
)
from amaxbridge.mappings.errors import MappingError

EXPERTS = "decoder.layers.*.mlp.experts.linear_fc1.weight_quantizer._amax"
OF_EXPERTS = ["model.layers.*.mlp.experts.*.gate_proj._amax", "model.layers.*.mlp.experts.*.up_proj._amax"]
W4A16: dict[str, Any] = {
    "quant_format": "pack-quantized", "ignore": ["lm_head"], "weight_bits": 4, "group_size": 32,
    "weight_strategy": "group", "weight_type": None, "weight_dynamic": False, "symmetric": True, "actorder": None,
    "input_bits": None, "input_strategy": None, "input_type": None, "input_dynamic": False, "input_symmetric": False,
}  # fmt: skip
W8A8: dict[str, Any] = {
    **W4A16, "quant_format": "int-quantized", "weight_bits": 8, "group_size": None, "weight_strategy": "channel",
    "weight_type": "int", "input_bits": 8, "input_strategy": "token", "input_type": "int", "input_dynamic": True,
    "input_symmetric": True,
}  # fmt: skip


class TestMappings:
    def test_amax_mapping(self) -> None:
        mapping = AmaxMapping("d.q._amax", "m.q._amax")
        assert isinstance(mapping, ReplicatedMapping) and isinstance(mapping, DirectMapping)
        assert (mapping.hf_param, mapping.is_expert) == ("m.q._amax", False)
        assert mapping.megatron_to_hf(torch.tensor(2.0), None) == {"m.q._amax": torch.tensor(2.0)}
        assert mapping.megatron_to_hf(None, None) == {}
        assert AmaxMapping(EXPERTS, OF_EXPERTS[0].replace("experts.*", "experts")).is_expert

    def test_amax_fanout_mapping(self) -> None:
        mapping = AmaxFanoutMapping("d.*.qkv._amax", ["m.*.q._amax", "m.*.k._amax"])
        assert isinstance(mapping, AmaxMapping)
        assert (mapping.hf_param, mapping.hf_targets) == ("m.*.q._amax", ["m.*.q._amax", "m.*.k._amax"])
        resolved = mapping.resolve(("3",))
        assert (resolved.hf_param, resolved.hf_targets) == ("m.3.q._amax", ["m.3.q._amax", "m.3.k._amax"])
        assert mapping.megatron_to_hf(None, None) == {}

    def test_moe_amax_fanout_mapping(self) -> None:
        mapping = MoeAmaxFanoutMapping(EXPERTS, OF_EXPERTS)
        assert isinstance(mapping, AmaxMapping)
        assert mapping.is_expert is False  # one quantizer of a rank: plain tensor-parallel handling
        assert mapping.hf_patterns == OF_EXPERTS
        resolved = mapping.resolve(("2",))
        assert resolved.hf_patterns == [name.replace("layers.*", "layers.2") for name in OF_EXPERTS]
        assert [mapping._EXPERT_WILDCARD_RE.sub("7", name) for name in resolved.hf_patterns] == [
            name.replace("layers.*", "layers.2").replace("experts.*", "experts.7") for name in OF_EXPERTS
        ]
        module = SimpleNamespace(config=SimpleNamespace(num_moe_experts=4))
        assert len(resolved.megatron_to_hf(torch.tensor(1.5), module)) == 8
        assert resolved.megatron_to_hf(None, module) == {}

    @pytest.mark.parametrize("field", ["num_moe_experts", "num_experts", "n_routed_experts"])
    def test_number_of_experts(self, field: str) -> None:
        mapping = MoeAmaxFanoutMapping(EXPERTS, OF_EXPERTS)
        assert mapping._get_num_experts(SimpleNamespace(config=SimpleNamespace(**{field: 6}))) == 6
        assert mapping._get_num_experts(SimpleNamespace(**{field: 6})) == 6
        assert mapping._get_num_experts(None) is None
        assert MoeAmaxFanoutMapping(EXPERTS, OF_EXPERTS, 3)._get_num_experts(None) == 3

    @pytest.mark.parametrize("kind", [AmaxFanoutMapping, MoeAmaxFanoutMapping])
    def test_no_targets_are_refused(self, kind: Any) -> None:
        with pytest.raises(MappingError, match="has no Hugging Face name"):
            kind("d.q._amax", [])
        with pytest.raises(MappingError, match="has no Hugging Face name"):
            AmaxMapping("d.q._amax", {})

    def test_registry(self) -> None:
        assert MegatronMappingRegistry is MappingRegistry


class TestRuntime:
    @pytest.mark.parametrize("keywords", [W4A16, W8A8], ids=["w4a16", "w8a8"])
    def test_every_argument_of_a_config_is_an_attribute(self, keywords: dict[str, Any]) -> None:
        config = CompressedTensorsConfig(**keywords)
        assert {name: getattr(config, name) for name in keywords} == {**keywords, "weight_type": "int"}
        assert len(keywords) == 14
        group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
        inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
        read = CompressedTensorsConfig.from_config(
            {"format": "int-quantized", "config_groups": {"group_0": {**group, "input_activations": inputs}}}
        )
        assert {name: getattr(read, name) for name in W8A8} == {**W8A8, "ignore": []}

    def test_attributes_that_differ_between_groups_are_none_of_the_config(self) -> None:
        group = {"weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}, "targets": ["re:.*a"]}
        other = {"weights": {"num_bits": 8, "group_size": 32, "strategy": "group"}, "targets": ["re:.*b"]}
        config = CompressedTensorsConfig.from_config(
            {"format": "pack-quantized", "config_groups": {"group_0": group, "group_1": other}}
        )
        assert config.group_size == 32
        with pytest.raises(UnsupportedQuantizationError, match="weight_bits differs between config groups"):
            _ = config.weight_bits

    def test_what_an_engine_asks_a_config(self) -> None:
        config = CompressedTensorsConfig(**W4A16)
        assert config.get_name() == "compressed-tensors"
        assert config.get_config_filenames() == ["config.json"]
        assert torch.bfloat16 in config.get_supported_act_dtypes()

    @pytest.mark.parametrize(
        ("keywords", "name", "kind"),
        [
            (W4A16, "w4a16", CompressedTensorsWNA16Scheme),
            (W4A16, "pack-quantized", CompressedTensorsWNA16Scheme),
            (W8A8, "w8a8", CompressedTensorsW8A8Int8Scheme),
        ],
    )
    def test_a_signature_is_a_string(self, keywords: dict[str, Any], name: str, kind: type) -> None:
        config = CompressedTensorsConfig(**keywords)
        method = CompressedTensorsLinearMethod(config, name)
        assert isinstance(method.scheme, kind)
        assert method.quant_config is config
        with pytest.raises(UnsupportedQuantizationError, match="no signature is called 'w2a2'; the config has w"):
            CompressedTensorsLinearMethod(config, "w2a2")

    def test_schemes_have_their_arguments(self) -> None:
        scheme = CompressedTensorsWNA16Scheme(weight_bits=4, group_size=32, symmetric=True, actorder="group")
        assert (scheme.weight_bits, scheme.group_size, scheme.symmetric, scheme.actorder) == (4, 32, True, "group")
        assert (scheme.pack_factor, scheme.quant_type) == (8, SCALAR_TYPE_UINT4B8)
        asymmetric = CompressedTensorsWNA16Scheme(weight_bits=4, group_size=32, symmetric=False, actorder=None)
        assert asymmetric.quant_type == SCALAR_TYPE_UINT4
        wide = CompressedTensorsWNA16Scheme(weight_bits=8, group_size=-1, symmetric=True, actorder=None)
        assert (wide.pack_factor, wide.quant_type.name) == (4, "uint8b128")
        assert CompressedTensorsW8A8Int8Scheme(weight_bits=8).weight_bits == 8

    def test_scalar_types(self) -> None:
        assert (SCALAR_TYPE_UINT4.id, SCALAR_TYPE_UINT4B8.id) == (1125899906843648, 1125899907892224)
        assert (SCALAR_TYPE_UINT4.name, SCALAR_TYPE_UINT4B8.name) == ("uint4", "uint4b8")

    def test_layers_are_what_they_are(self) -> None:
        class Projection(nn.Module):
            """As engines build theirs: its name says nothing."""

            input_size, output_size = 64, 32

        class LinearAttentionNorm(nn.Module):
            pass

        config = CompressedTensorsConfig(**W4A16)
        for layer in (nn.Linear(1, 1), Projection(), nn.Module()):
            assert config.get_quant_method(layer, "m") is not None, layer
        for layer in (nn.Embedding(1, 1), nn.LayerNorm(1), nn.LSTM(1, 1), nn.Conv1d(1, 1, 1), LinearAttentionNorm()):
            assert config.get_quant_method(layer, "m") is None, layer
        assert config.get_quant_method(nn.Linear(1, 1), "lm_head") is None

    def test_merged_layers_have_one_weight_shape(self) -> None:
        """Merged on disk, its shape is that of all modules; loaded, it is that of the layer."""
        method = CompressedTensorsLinearMethod(CompressedTensorsConfig(**W4A16), "w4a16")
        layer = nn.Module()
        method.create_weights(layer, 128, [64, 32, 32], 128, 128, torch.bfloat16)
        tensors = {
            "weight_packed": torch.zeros(128, 16, dtype=torch.int32),
            "weight_scale": torch.ones(128, 4),
            "weight_shape": torch.tensor([128, 128]),
        }
        for name, tensor in tensors.items():
            parameter = layer.get_parameter(name)
            parameter.weight_loader(parameter, tensor)
        method.process_weights_after_loading(layer)
        assert layer.get_parameter("weight_shape").tolist() == [128, 128]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_int8_rounds_half_away_from_zero(self, dtype: torch.dtype) -> None:
        """131,072 codes equal `x * (127 / absmax)` in fp32, rounded half away from zero, with IEEE's division."""
        x = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
        codes, scale = quantize_int8(x)
        absmax = x.float().abs().amax(-1, keepdim=True)
        product = (x.float() * (torch.full_like(absmax, 127) / absmax)).double()
        assert torch.equal(codes.double(), product.sign() * (product.abs() + 0.5).floor())
        assert torch.equal(scale, absmax / torch.full_like(absmax, 127))
