"""Megatron's settings: their command-line names, their defaults, and which of them change what a model computes.

A setting is named as in `TransformerConfig` or in the model class. Among the arguments that training saves in a
checkpoint, some settings have other names, which change between releases, and a few have another form:

    activation, gated_linear_unit           --swiglu, --quick-geglu, --squared-relu
    share_embeddings_and_output_weights     --untie-embeddings-and-output-weights
    num_query_groups                        --group-query-attention, --num-query-groups
    moe_layer_freq, a list                  the same, or the distance between layers with experts
    window_attn_skip_freq, a list           the same, or the distance between layers without a window
    linear_attention_freq, a list           the same, or the distance between layers with softmax attention
    no_rope_freq, a list                    the same, or the distance between layers without rotary embedding

Source: megatron.training.arguments, and core_transformer_config_from_args beside it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.hybrid_layers import once

type Settings = Mapping[str, Any]

_ARGUMENTS: Mapping[str, tuple[str, ...]] = {  # setting → names of its argument: the current one, then older ones
    "num_moe_experts": ("num_experts",),
    "layernorm_epsilon": ("layernorm_epsilon", "norm_epsilon"),
    "layernorm_zero_centered_gamma": ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
    "max_sequence_length": ("max_position_embeddings",),
    "rope_scaling": ("use_rope_scaling",),
    "seq_len_interpolation_factor": ("rotary_seq_len_interpolation_factor",),
    "yarn_rotary_scaling_factor": ("rotary_scaling_factor",),
    "yarn_mscale": ("mscale",),
    "yarn_mscale_all_dim": ("mscale_all_dim",),
    "hybrid_layer_pattern": ("hybrid_layer_pattern", "hybrid_override_pattern"),
}
_ACTIVATIONS = {  # argument → activation and whether it is gated
    "swiglu": ("silu", True),
    "quick_geglu": ("quick_gelu", True),
    "squared_relu": ("relu2", False),
}

DEFAULTS: Settings = {
    "activation": "gelu",
    "gated_linear_unit": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "post_self_attn_layernorm": False,
    "post_mlp_layernorm": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "qk_layernorm_after_rotary": False,
    "attention_chunk_size": None,
    "attn_temperature_tuning": False,
    "floor_scale": None,
    "attn_scale": None,
    "attention_output_gate": False,
    "softmax_scale": None,
    "embedding_multiplier": None,
    "residual_multiplier": None,
    "logits_scaling": None,
    "softmax_type": "vanilla",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "position_embedding_type": "learned_absolute",
    "no_rope_freq": None,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rope_type": "yarn",
    "rotary_scaling_factor": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_rotary_scaling_factor": 1.0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
    "num_moe_experts": None,
    "moe_router_topk": 2,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "mtp_num_layers": None,
    "mtp_use_repeated_layer": False,
    "use_mup": False,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "share_embeddings_and_output_weights": True,
}
"""Megatron's default of every setting that changes what a model computes. Sizes have no default."""

_MOST_LAYERS, _LARGEST = 2_000, (1 << 31) - 1
_SIZES = dict.fromkeys(("num_layers", "mtp_num_layers"), _MOST_LAYERS) | dict.fromkeys(
    (
        "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "num_moe_experts",
        "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size", "moe_latent_size",
        "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "vocab_size",
        "padded_vocab_size",
        "max_sequence_length", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim",
        "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
        "linear_conv_kernel_dim", "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk",
        "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset",
    ),
    _LARGEST,
)  # fmt: skip
"""Settings that are sizes, and the largest that any model has."""
_TEXTS = frozenset(
    (
        "hybrid_layer_pattern", "experimental_attention_variant", "heterogeneous_layers_config_path",
        "heterogeneous_layers_config_encoded_json",
    )
)  # fmt: skip
_PER_LAYER = frozenset(("moe_layer_freq", "window_attn_skip_freq", "linear_attention_freq", "no_rope_freq"))
"""Settings with a number for each layer, or the distance between layers of one kind."""

_YARN_OF_LATENT_ATTENTION = {
    "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
}  # fmt: skip
_USED_IF: tuple[tuple[Callable[[Settings], Any], Callable[[str], bool]], ...] = (  # condition → settings
    (lambda all_: all_["num_moe_experts"], lambda name: name.startswith("moe_")),
    (lambda all_: all_["moe_router_score_function"] == "softmax", lambda name: name == "moe_router_pre_softmax"),
    (lambda all_: _has_dense_layers(all_), lambda name: name == "ffn_hidden_size"),
    (lambda all_: not all_["add_bias_linear"], lambda name: name == "add_qkv_bias"),
    (lambda all_: all_["window_size"], lambda name: name == "window_attn_skip_freq"),
    (
        lambda all_: all_["experimental_attention_variant"] == "gated_delta_net",
        lambda name: name.startswith("linear_"),
    ),
    (lambda all_: all_["attn_temperature_tuning"], lambda name: name in {"floor_scale", "attn_scale"}),
    (lambda all_: all_["rope_scaling"], lambda name: name == "rope_scaling_factor"),
    (lambda all_: all_["multi_latent_attention"], lambda name: name in {"rope_type", "q_lora_rank"}),
    (lambda all_: _has_yarn(all_, latent=True), lambda name: name in _YARN_OF_LATENT_ATTENTION),
    (lambda all_: _has_yarn(all_, latent=False), lambda name: name.startswith("yarn_")),
    (lambda all_: all_["position_embedding_type"] != "none", lambda name: name.startswith("rotary_")),
)


def _has_dense_layers(settings: Settings) -> bool:
    pattern = settings.get("hybrid_layer_pattern")
    return "-" in pattern if pattern else not settings["num_moe_experts"] or 0 in settings.get("moe_layer_freq", ())


def _has_yarn(settings: Settings, *, latent: bool) -> bool:
    kind = settings["rope_type"] if latent else settings["position_embedding_type"]
    return bool(settings["multi_latent_attention"]) == latent and kind == "yarn"


def argument(setting: str) -> str:
    """The current name of a setting among the arguments of training."""
    return _ARGUMENTS.get(setting, (setting,))[0]


def to_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments that training would save for a model with these settings."""
    rest = {name: value for name, value in settings.items() if name != "share_embeddings_and_output_weights"}
    tied = settings.get("share_embeddings_and_output_weights", True)
    kind = rest.get("activation"), rest.get("gated_linear_unit")
    flags = {name: kind == each for name, each in _ACTIVATIONS.items()}
    if any(flags.values()):
        del rest["activation"], rest["gated_linear_unit"]
    return {
        **{argument(name): value for name, value in rest.items()},
        **flags,
        "group_query_attention": True,
        "untie_embeddings_and_output_weights": not tied,
    }


def from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among saved arguments, and those that Megatron derives from them; without defaults."""
    settings = told(arguments)
    return settings | dict(_made_of_others(settings)) | _with_one_repeated_layer(settings)


def _with_one_repeated_layer(settings: Settings) -> dict[str, Any]:
    """What changes if an MTP layer that all depths share counts once, as it lies in files."""
    if not (settings.get("mtp_use_repeated_layer") and settings.get("mtp_num_layers")):
        return {}
    pattern = settings.get("hybrid_layer_pattern")
    return {
        "mtp_use_repeated_layer": False,
        "mtp_num_layers": 1,
        **({"hybrid_layer_pattern": once(pattern)} if pattern else {}),
    }


def told(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the arguments. None counts as absent.

    Raises:
        CheckpointError: settings are of another type, or sizes that no model has. They come from an untrusted file.
    """
    said = {name: value for name, value in arguments.items() if value is not None}
    settings = dict(said)
    for name, spellings in _ARGUMENTS.items():
        found = [said[spelling] for spelling in spellings if spelling in said]
        if found:
            settings[name] = found[0]
    for name, (activation, gated) in _ACTIVATIONS.items():
        if said.get(name):
            settings |= {"activation": activation, "gated_linear_unit": gated}
    if "untie_embeddings_and_output_weights" in said:
        settings["share_embeddings_and_output_weights"] = not said["untie_embeddings_and_output_weights"]
    if "disable_bias_linear" in said:
        settings["add_bias_linear"] = not said["disable_bias_linear"]
    wrong = [f"--{argument(name)} {repr(value)[:80]}" for name, value in settings.items() if not _is_right(name, value)]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} arguments saved with the checkpoint are none that training takes:{listing(wrong)}\n"
            "Give a checkpoint with the arguments that it was trained with, or hf="
        )
    return settings


def _is_right(name: str, value: Any) -> bool:
    """True if a setting has the type that Megatron gives it. Arguments that are no setting here may be anything."""
    if name in _SIZES:
        return type(value) is int and 0 <= value <= _SIZES[name]
    if name in _TEXTS:
        return isinstance(value, str)
    if name in _PER_LAYER:
        each = value if isinstance(value, list | tuple) else [value]
        least = 0 if each is value else 1  # a distance between layers is at least one
        return len(each) <= _MOST_LAYERS and all(type(one) is int and least <= one <= _LARGEST for one in each)
    if name == "window_size":
        return isinstance(value, list | tuple) and len(value) == 2 and all(type(one) is int for one in value)
    if name not in DEFAULTS:
        return True
    if isinstance(DEFAULTS[name], bool):
        return isinstance(value, bool)
    if isinstance(DEFAULTS[name], str):
        return isinstance(value, str)
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _made_of_others(settings: Settings) -> Iterator[tuple[str, Any]]:
    """The settings that Megatron derives from others if they are absent."""
    heads, layers, experts = (settings.get(name) for name in ("num_attention_heads", "num_layers", "num_moe_experts"))
    if heads and not (settings.get("group_query_attention", True) and settings.get("num_query_groups")):
        yield "num_query_groups", heads
    if heads and "kv_channels" not in settings and "hidden_size" in settings:
        yield "kv_channels", settings["hidden_size"] // heads
    if experts and "moe_ffn_hidden_size" not in settings and "ffn_hidden_size" in settings:
        yield "moe_ffn_hidden_size", settings["ffn_hidden_size"]
    every = settings.get("moe_layer_freq", 1)
    if experts and layers and isinstance(every, int):
        yield "moe_layer_freq", [int(layer % every == 0) for layer in range(layers)]
    full = settings.get("window_attn_skip_freq")
    if layers and isinstance(full, int):
        yield "window_attn_skip_freq", [int((layer + 1) % full != 0) for layer in range(layers)]
    attends = settings.get("linear_attention_freq")
    if layers and isinstance(attends, int):
        yield "linear_attention_freq", [int((layer + 1) % attends != 0) for layer in range(layers)]
    unrotated = settings.get("no_rope_freq")
    if layers and isinstance(unrotated, int):
        yield "no_rope_freq", [int((layer + 1) % unrotated == 0) for layer in range(layers)]


def in_use(settings: Settings) -> dict[str, Any]:
    """The settings with defaults filled in, without those that have no effect."""
    filled = {**DEFAULTS, **settings}
    filled["moe_router_topk_scaling_factor"] = filled["moe_router_topk_scaling_factor"] or 1.0  # None means 1
    idle = [takes for condition, takes in _USED_IF if not condition(filled)]
    return {name: value for name, value in filled.items() if not any(takes(name) for takes in idle)}


def differences(found: Settings, expected: Settings) -> list[str]:
    """Names of the settings in which two models differ, among those in `expected` and those with a default."""
    ours, theirs = in_use(found), in_use(expected)
    return [
        name
        for name in {**DEFAULTS, **expected}
        if (name in ours or name in theirs) and not _same(ours.get(name), theirs.get(name))
    ]


def _same(one: Any, other: Any) -> bool:
    """True if two values are equal. None, 0 and False are the same, and so are a list and a tuple."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other) or not (one or other)
