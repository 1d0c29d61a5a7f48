"""The types of the fields of config.json that are read here, checked once where the file is read.

A config.json comes from anywhere. Past this check a size is a number that a loop may count to, a name is a string, and
a list of names holds strings; what is absent or null stays so. Fields that are not listed are carried and never read.

    check_all_fields(config, where)               any architecture: numbers may be lists there, one for each layer
    check_fields(config, where, OF_FAMILIES)      the language model of a family in `mappings.families`
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.model_config import EXPERT_COUNTS

_MOST_LAYERS = 2_000  # loops count layers and experts; published models have 126 and 512
_MOST_EXPERTS = 100_000
_LARGEST = (1 << 31) - 1

_COUNTS_LAYERS = re.compile(r"(^|_)(layers?|depth)(_|$)")

type Test = Callable[[Any], bool]
type FieldTypes = Mapping[str, tuple[str, Test]]
"""Name of a field → what its value is, in words, and the test for it."""


def _whole(least: int, most: int) -> tuple[str, Test]:
    return f"a whole number from {least} to {most:,}", lambda value: type(value) is int and least <= value <= most


def _or_list(kind: tuple[str, Test]) -> tuple[str, Test]:
    what, holds = kind
    return (
        f"{what}, or a list of them",
        lambda value: all(map(holds, value)) if isinstance(value, list) else holds(value),
    )


def _list_of(what: str, holds: Test) -> tuple[str, Test]:
    return f"a list of {what}", lambda value: isinstance(value, list) and all(map(holds, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST and not math.isnan(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


_LAYERS, _EXPERTS, _SIZE = _whole(0, _MOST_LAYERS), _whole(0, _MOST_EXPERTS), _whole(1, _LARGEST)
_NUMBER: tuple[str, Test] = ("a number", _is_number)
_POSITIVE: tuple[str, Test] = ("a positive number", lambda value: _is_number(value) and value > 0)
_FLAG: tuple[str, Test] = ("true or false", lambda value: isinstance(value, bool))
_NAME: tuple[str, Test] = ("a name", _is_text)
_NAMES = _list_of("names", _is_text)
_OBJECT: tuple[str, Test] = ("an object", lambda value: isinstance(value, Mapping))

EVERY_MODEL: FieldTypes = MappingProxyType(
    {
        "architectures": _NAMES,
        "model_type": _NAME,
        "text_config": _OBJECT,
        "tie_word_embeddings": _FLAG,
        "num_hidden_layers": _or_list(_LAYERS),
        "num_nextn_predict_layers": _or_list(_LAYERS),
        "hidden_size": _or_list(_whole(0, _LARGEST)),
        "num_attention_heads": _or_list(_whole(0, _LARGEST)),
        "num_key_value_heads": _or_list(_whole(0, _LARGEST)),
        **dict.fromkeys(EXPERT_COUNTS, _or_list(_EXPERTS)),
    }
)
"""Fields with one meaning in all architectures."""

OF_FAMILIES: FieldTypes = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "hidden_size", "intermediate_size", "intermediate_size_mlp", "head_dim", "num_attention_heads",
                "num_key_value_heads",
                "vocab_size", "moe_intermediate_size", "moe_latent_size", "q_lora_rank", "kv_lora_rank",
                "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                "index_n_heads", "index_head_dim", "index_topk",
                "mamba_head_dim", "mamba_num_heads", "n_groups", "ssm_state_size",
                "mamba_d_head", "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "shared_intermediate_size",
                "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
                "linear_conv_kernel_dim", "moe_layer_interval", "decoder_sparse_step", "max_position_embeddings",
                "original_max_position_embeddings",
            ),
            _SIZE,
        ),
        **dict.fromkeys(
            (
                "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts", "n_group",
                "topk_group", "num_experts_per_tok", "sliding_window",
                "index_topk_freq", "index_skip_topk_offset", "num_shared_experts",
                "attention_chunk_size", "floor_scale", "moe_num_shared_experts", "moe_k", "moe_layer_start_index",
            ),
            _whole(0, _LARGEST),
        ),
        **dict.fromkeys(EXPERT_COUNTS, _EXPERTS),
        **dict.fromkeys(
            ("num_hidden_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers", "first_k_dense_replace"), _LAYERS
        ),
        **dict.fromkeys(
            (
                "rms_norm_eps", "layer_norm_epsilon", "routed_scaling_factor", "query_pre_attn_scalar", "rope_theta",
                "factor", "router_scaling_factor", "attention_multiplier", "embedding_multiplier",
                "residual_multiplier", "logits_scaling",
            ),
            _POSITIVE,
        ),
        **dict.fromkeys(
            (
                "attn_logit_softcapping", "final_logit_softcapping", "swiglu_limit", "swiglu_alpha", "mscale",
                "mscale_all_dim", "beta_fast", "beta_slow", "partial_rotary_factor", "attn_scale", "alpha",
                "llama_4_scaling_beta",
            ),
            _NUMBER,
        ),
        **dict.fromkeys(
            (
                "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "mamba_proj_bias", "norm_topk_prob",
                "rope_interleave", "tie_word_embeddings", "use_qk_norm", "use_sliding_window", "truncate",
                "attn_temperature_tuning",
            ),
            _FLAG,
        ),
        **dict.fromkeys(
            ("rope_type", "type", "model_type", "hidden_act", "hidden_activation", "mlp_hidden_act"), _NAME
        ),
        **dict.fromkeys(
            (
                "architectures", "layer_types", "layers_block_type", "mtp_layers_block_type", "mlp_layer_types",
                "indexer_types",
            ),
            _NAMES,
        ),
        **dict.fromkeys(("rope_parameters", "full_attention", "sliding_attention"), _OBJECT),
        **dict.fromkeys(("mlp_only_layers", "moe_layers"), _list_of("layers", _LAYERS[1])),
        "moe_topk": _or_list(_whole(0, _MOST_EXPERTS)),
        "no_rope_layers": _list_of("zeros and ones", lambda value: type(value) is int and value in (0, 1)),
    }
)  # fmt: skip
"""Fields that the families of `mappings.families` read, those of rotary parameters among them."""

_INSIDE = ("rope_parameters", "full_attention", "sliding_attention")
_NEVER_NULL = frozenset(
    (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings",
        "rms_norm_eps", "layer_norm_epsilon", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "mamba_head_dim",
        "mamba_num_heads", "n_groups", "ssm_state_size", "decoder_sparse_step", "first_k_dense_replace",
        "layer_types", "layers_block_type", "num_experts_per_tok", "query_pre_attn_scalar", "rope_theta", "factor",
        "rope_parameters", "moe_intermediate_size", "rope_type",
    )
)  # fmt: skip
"""The fields of families without which there is no model, where config.json has them at all."""


def check_fields(config: Mapping[str, Any], where: object, types: FieldTypes) -> None:
    """Raises UsageError if fields have values of another type or out of bounds; all are named.

    Args:
        config: the fields. An absent field passes, and so does null where it stands for a default.
        where: the file, for the message.
        types: `EVERY_MODEL` or `OF_FAMILIES`.
    """
    wrong = list(_wrong(config, types))
    if wrong:
        raise UsageError(f"{where}: {len(wrong)} fields have values that no model has:{listing(wrong)}\nCorrect them")


def check_all_fields(config: Mapping[str, Any], where: object) -> None:
    """As `check_fields`, of `EVERY_MODEL` and of the numbers of layers in every object of a whole config.json."""
    todo: list[tuple[str, Any]] = [("", config)]
    wrong: list[str] = []
    while todo:
        prefix, each = todo.pop()
        wrong += [f"{prefix}{what}" for what in (*_wrong(each, EVERY_MODEL), *_too_deep(each))]
        todo += [
            (f"{prefix}{name[:80]}.", inner)
            for name, inner in each.items()
            if isinstance(inner, Mapping) and name != "quantization_config"
        ]
    if wrong:
        raise UsageError(f"{where}: {len(wrong)} fields have values that no model has:{listing(wrong)}\nCorrect them")


def _too_deep(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if _COUNTS_LAYERS.search(name) and name not in EVERY_MODEL and type(value) is int and value > _MOST_LAYERS:
            yield f"{name} is {value}, more layers than any model has"


def _wrong(config: Mapping[str, Any], types: FieldTypes) -> Iterator[str]:
    for name, (what, holds) in types.items():
        if name not in config or (config[name] is None and not (types is OF_FAMILIES and name in _NEVER_NULL)):
            continue
        if not holds(config[name]):
            yield f"{name} is {what}, not {repr(config[name])[:80]}"
        elif name in _INSIDE:
            yield from (f"{name}.{each}" for each in _wrong(config[name], types))
