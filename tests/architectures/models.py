"""transformers' models on the meta device: one for each variant of an architecture's configuration.

A configuration decides which tensors a model has: biases, norms of queries and keys, dense layers before the first
experts, low-rank queries. So a model is built from a tiny configuration, and from others that differ from it in one
field.
"""

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from tests.sweep.architectures import Row, rows
from tests.sweep.shrunken_configs import tiny_config

_OPTIONAL_SIZES: Mapping[str, int] = MappingProxyType(
    {
        **{"head_dim": 96, "q_lora_rank": 192, "num_key_value_heads": 4, "ffn_dim": 4096, "n_shared_experts": 1},
        "moe_latent_size": 160,
    }
)
"""Fields that may be None, with a size that no other field has."""
_FACTORS: tuple[Mapping[str, int], ...] = (
    {
        **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 3),
        **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 5),
        **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 7),
        **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 11),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 2),
        **dict.fromkeys(("head_dim", "v_head_dim", "q_lora_rank"), 3),
        **dict.fromkeys(("qk_nope_head_dim", "kv_lora_rank"), 5),
    },
    {
        **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 5),
        **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 3),
        **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 11),
        **dict.fromkeys(("head_dim", "kv_lora_rank"), 7),
        **dict.fromkeys(("qk_rope_head_dim", "q_lora_rank"), 2),
        **dict.fromkeys(("v_head_dim", "qk_nope_head_dim"), 3),
        "zero_expert_num": 3,
    },
    {"hidden_size": 2, "intermediate_size": 3, "moe_intermediate_size": 5, "d_model": 2, "d_ff": 3, "n_embd": 2},
    {"intermediate_size": 3, "moe_intermediate_size": 5, "d_ff": 3, "ffn_dim": 3},
)
"""Factors by which sizes are changed, for a model each where one can be built."""
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_DENSE_LAYERS: Mapping[str, Any] = MappingProxyType(
    {"first_k_dense_replace": 1, "decoder_sparse_step": 2, "mlp_only_layers": [0], "mlp_layer_types": "dense"}
)
"""Fields that say which layers have no experts, and a value that leaves some layers without."""
_NOT_OF_WEIGHTS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states", "tie_word_embeddings")


def architectures() -> list[str]:
    """Architectures with a language model in transformers; `Class.model_type` for types that have another's class."""
    return sorted({row.architecture if _is_own(row) else f"{row.architecture}.{row.model_type}" for row in rows()})


def _is_own(row: Row) -> bool:
    """True if the model type is the class's own, or one of which the class's is a part."""
    own, kind = getattr(transformers, row.architecture).config_class, CONFIG_MAPPING[row.model_type]
    return own is None or own.model_type == row.model_type or bool(kind.sub_configs) is not bool(own.sub_configs)


def build(architecture: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device, with its ties."""
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, architecture.partition(".")[0])(config)
    return model


def config_of(architecture: str) -> PreTrainedConfig:
    """A tiny configuration of the architecture, with every kind of layer."""
    name, _, model_type = architecture.partition(".")
    kind = CONFIG_MAPPING[model_type] if model_type else getattr(transformers, name).config_class
    config: PreTrainedConfig = tiny_config(kind)
    return config


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's configuration; its decoder's, where an encoder stands beside it."""
    return config.get_text_config(decoder=True)


def variants(architecture: str) -> Iterator[tuple[str, PreTrainedModel]]:
    """Models whose configurations differ in one field, by that field; first the one that differs in none, as ""."""
    base = config_of(architecture)
    yield "", build(architecture, base)
    fields = {**dict.fromkeys(_OPTIONAL_SIZES), **vars(text_config_of(base))}  # optional ones need not be declared
    for name, value in fields.items():
        other: Any = None
        if isinstance(value, bool) and name not in _NOT_OF_WEIGHTS and not name.startswith("_"):
            other = not value
        elif name in _OPTIONAL_SIZES:
            other = _OPTIONAL_SIZES[name] if value is None else None
        elif name in _DENSE_LAYERS and value is not None:
            other = _DENSE_LAYERS[name]
            if isinstance(value, list) and value:
                other = [other, *value[1:]]
        else:
            continue
        try:
            yield name, build(architecture, _changed(base, name, other))
        except Exception:  # a field that cannot differ alone
            continue


def resized(architecture: str) -> Iterator[PreTrainedModel]:
    """Models with other sizes, in each of which no two sizes are changed by the same factor if possible."""
    for factors in _FACTORS:
        config = copy.deepcopy(config_of(architecture))
        text = text_config_of(config)
        try:
            for name in _SHARED:
                if type(getattr(text, name, None)) is int:
                    setattr(text, name, 2)
            for name, factor in factors.items():
                if type(value := getattr(text, name, None)) is int and value > 1:
                    setattr(text, name, value * factor)
            yield build(architecture, config)
        except Exception:  # sizes that must divide each other do not
            continue


def _changed(base: PreTrainedConfig, name: str, value: Any) -> PreTrainedConfig:
    config = copy.deepcopy(base)
    setattr(text_config_of(config), name, value)
    return config
