"""ModelConfig says the same of a model whether config.json, Megatron or saved arguments describe it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch import nn

from amaxbridge.bridge.hf import HFModel
from amaxbridge.mappings.amax import MoeAmaxFanoutMapping
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.families import family_of
from amaxbridge.mappings.mamba_mixer import MambaProjectionMapping
from amaxbridge.mappings.megatron_settings import from_arguments, to_arguments
from amaxbridge.mappings.model_config import ModelConfig, number_of_experts
from amaxbridge.mappings.weights import LatentDownMapping, QKVMapping
from tests.support.published_models import NOT_BUILT, PARAMETERS, published

OF_THE_MODEL = {"vocab_size", "padded_vocab_size"}  # Megatron's model has these, its TransformerConfig does not


def hf_model(name: str) -> HFModel:
    filled = published(name).to_dict()
    return HFModel(Path(), filled, filled, family_of(filled))


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - NOT_BUILT.keys()))
def test_all_descriptions_of_a_model_agree(name: str) -> None:
    hf = hf_model(name)
    expected = hf.model_config
    fields = hf.family.transformer_config(hf.config)
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    live = ModelConfig.of(kind(**fields, use_cpu_initialization=True))
    saved = ModelConfig.of(from_arguments(to_arguments(hf.family.settings(hf.config))))
    assert saved == expected
    said = {name for name, value in dataclasses.asdict(expected).items() if value is not None} - OF_THE_MODEL
    assert {"num_attention_heads", "num_query_groups"} < said
    assert {name: getattr(live, name) for name in said - {"transformer_impl"}} == {
        name: getattr(expected, name) for name in said - {"transformer_impl"}
    }


def test_the_founding_api_takes_a_real_megatron_module() -> None:
    """`megatron_to_hf(weights, module)` and back, with the configuration that the module has."""
    module = nn.Module()
    module.config = TransformerConfig(  # type: ignore[assignment]
        num_layers=1, hidden_size=8, num_attention_heads=4, num_query_groups=2, use_cpu_initialization=True
    )
    mapping, fused = QKVMapping("qkv.weight", "q", "k", "v"), torch.arange(48.0).reshape(16, 3)
    tensors = mapping.megatron_to_hf(fused, module)
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"q": 8, "k": 4, "v": 4}
    assert torch.equal(mapping.hf_to_megatron(tensors, module), fused)


@pytest.mark.parametrize(
    "name", ["num_moe_experts", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"]
)
def test_the_number_of_experts_has_many_names(name: str) -> None:
    mapping = MoeAmaxFanoutMapping("d.q._amax", ["m.experts.*.up._amax"])
    without = SimpleNamespace(num_moe_experts=None, num_experts=0)
    for module in (
        SimpleNamespace(**{name: 3}),
        SimpleNamespace(config=SimpleNamespace(**{name: 3})),
        SimpleNamespace(config=without, **{name: 3}),
    ):
        assert len(mapping.megatron_to_hf(torch.tensor(1.0), module)) == 3
    assert number_of_experts({name: 3}) == 3
    assert number_of_experts(SimpleNamespace(**{name: None})) is None


@pytest.mark.parametrize(
    ("mapping", "missing"),
    [
        (QKVMapping("a", "q", "k", "v"), "num_attention_heads"),
        (LatentDownMapping("a", "h", rows=("q_lora_rank",)), "q_lora_rank"),
        (MambaProjectionMapping("a", "h"), "mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim"),
    ],
)
def test_a_size_that_is_needed_and_not_known_is_named(mapping: QKVMapping, missing: str) -> None:
    for config in (None, ModelConfig(), SimpleNamespace(num_layers=2)):
        with pytest.raises(MappingError, match=rf"^a: 2 shard.*does not say {missing}$"):
            mapping.join([torch.zeros(8, 2)] * 2, config)


def test_a_padded_vocabulary() -> None:
    assert ModelConfig(vocab_size=10).padded_to(4).padded_vocab_size == 12
    assert ModelConfig(vocab_size=12).padded_to(4).padded_vocab_size == 12
    with pytest.raises(ValueError, match="vocab_size"):
        ModelConfig().padded_to(2)
