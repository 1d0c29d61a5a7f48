"""HybridModel's layers get the names that the mappings use."""

import pytest

from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.hybrid_layers import (
    hybrid_name,
    read_pattern,
    transformer_name,
    transformer_pattern,
    transformer_settings,
    with_stages,
)


@pytest.mark.parametrize(
    ("name", "gpt_name"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.self_attention.linear_qkv.weight"),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
        ("decoder.layers.2.input_layernorm.weight", "decoder.layers.1.input_layernorm.weight"),
        ("decoder.layers.3.mixer.in_proj.weight", "decoder.layers.2.mixer.in_proj.weight"),  # without an MLP
        (
            "decoder.layers.5.mlp.experts.local_experts.7.linear_fc1.weight_quantizer._amax",
            "decoder.layers.3.mlp.experts.linear_fc1.weight_quantizer.7._amax",
        ),
        (
            "mtp.layers.1.mtp_model_layer.layers.0.self_attention.linear_proj.weight",
            "mtp.layers.1.mtp_model_layer.self_attention.linear_proj.weight",
        ),
        ("mtp.layers.1.mtp_model_layer.layers.1.mlp.router.weight", "mtp.layers.1.mtp_model_layer.mlp.router.weight"),
        ("mtp.layers.1.enorm.weight", "mtp.layers.1.enorm.weight"),
        ("decoder.final_norm.weight", "decoder.final_layernorm.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_a_transformer_has_the_names_of_its_gpt_model(name: str, gpt_name: str) -> None:
    assert transformer_name(name, "*-*|M*E/*E/*E") == gpt_name


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("decoder.layers.0.mixer.in_proj.layer_norm_weight", "decoder.layers.0.norm.weight"),
        ("decoder.layers.0.mixer.norm.weight", "decoder.layers.0.mixer.norm.weight"),
        ("decoder.layers.0.mixer.conv1d_bias", "decoder.layers.0.mixer.conv1d.bias"),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.1.norm.weight"),
        ("decoder.layers.2.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.2.norm.weight"),
        ("mtp.layers.1.mtp_model_layer.layers.1.pre_mlp_layernorm.weight", "mtp.layers.3.norm.weight"),
        ("mtp.layers.1.enorm.weight", "mtp.layers.2.enorm.weight"),
        ("mtp.layers.1.eh_proj.weight", "mtp.layers.2.eh_proj.weight"),
        ("mtp.layers.1.final_layernorm.weight", "mtp.layers.3.final_layernorm.weight"),
    ],
)
def test_a_hybrid_keeps_its_layers(name: str, canonical: str) -> None:
    assert hybrid_name(name, "M-*/*E/*E") == canonical


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("decoder.layers.4.input_layernorm.weight", "*-*-", r"decoder\.layers\.4.*no such layer.*\*-\*-"),
        ("decoder.layers.0.input_layernorm.weight", "*-X", "layers are the letters"),
        ("decoder.layers.0.input_layernorm.weight", "*--", "must follow attention"),
        ("decoder.layers.0.input_layernorm.weight", "*-/*-/*E", "must be the same"),
        ("mtp.layers.0.mtp_model_layer.layers.2.input_layernorm.weight", "*-/*-*-", "more than one layer"),
    ],
)
def test_patterns_that_no_transformer_has_are_refused(name: str, pattern: str, message: str) -> None:
    with pytest.raises(MappingError, match=message):
        transformer_name(name, pattern)


def test_patterns() -> None:
    assert read_pattern("M-|*E/*E/*E") == ("M-*E", "*E", 2)
    assert transformer_pattern({"num_layers": 2}) == "*-*-"
    assert transformer_pattern({"num_layers": 2, "num_moe_experts": 4}) == "*E*E"
    sparse = {"num_layers": 3, "moe_layer_freq": [0, 1, 1], "multi_latent_attention": True, "mtp_num_layers": 2}
    assert transformer_pattern(sparse) == "+-+E+E/+E/+E"
    assert with_stages("*-*E*E/*E", 2) == "*-*|E*E/*E"
    assert with_stages("M-*", 1) == "M-*"


def test_gated_delta_nets_alternate_with_mlps_as_attention_does() -> None:
    config = {
        "num_layers": 4,
        "moe_layer_freq": [1, 1, 0, 1],
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 1, 1, 0],
        "multi_latent_attention": False,
        "mtp_num_layers": 1,
    }
    assert transformer_pattern(config) == "GEGEG-*E/*E"
    assert transformer_settings("GEGEG-*E/*E") == config
    plain = transformer_settings("*-*E")
    assert (plain["experimental_attention_variant"], plain["linear_attention_freq"]) == (None, None)
    with pytest.raises(MappingError, match="attention must alternate"):
        transformer_settings("GG*-")
