"""The modules of a decoder that most families name alike, in Megatron and in Hugging Face.

A family lists the modules it has and adds its own. The tables below the mappings translate sizes into Megatron's
configuration, and state which features of a config Megatron computes as transformers does.
"""

from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.family import HFConfig, Source, Translation, fixed, look_up
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import (
    GatedMLPMapping,
    PackedGatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
    VocabParallelMapping,
)

MEGATRON = "decoder.layers.*"
HF = "model.layers.*"

EMBEDDING = VocabParallelMapping("embedding.word_embeddings.weight", "model.embed_tokens.weight")

INPUT_NORM = ReplicatedMapping(f"{MEGATRON}.input_layernorm.weight", f"{HF}.input_layernorm.weight")
QKV_WEIGHT = QKVMapping(
    f"{MEGATRON}.self_attention.linear_qkv.weight",
    q=f"{HF}.self_attn.q_proj.weight",
    k=f"{HF}.self_attn.k_proj.weight",
    v=f"{HF}.self_attn.v_proj.weight",
)
QKV = (INPUT_NORM, QKV_WEIGHT)
QKV_BIAS = QKVMapping(
    f"{MEGATRON}.self_attention.linear_qkv.bias",
    q=f"{HF}.self_attn.q_proj.bias",
    k=f"{HF}.self_attn.k_proj.bias",
    v=f"{HF}.self_attn.v_proj.bias",
)
QK_NORMS = (
    ReplicatedMapping(f"{MEGATRON}.self_attention.q_layernorm.weight", f"{HF}.self_attn.q_norm.weight"),
    ReplicatedMapping(f"{MEGATRON}.self_attention.k_layernorm.weight", f"{HF}.self_attn.k_norm.weight"),
)
ATTENTION_OUTPUT = RowParallelMapping(f"{MEGATRON}.self_attention.linear_proj.weight", f"{HF}.self_attn.o_proj.weight")

MLP_NORM = ReplicatedMapping(f"{MEGATRON}.pre_mlp_layernorm.weight", f"{HF}.post_attention_layernorm.weight")
GATE_AND_UP = GatedMLPMapping(
    f"{MEGATRON}.mlp.linear_fc1.weight",
    gate=f"{HF}.mlp.gate_proj.weight",
    up=f"{HF}.mlp.up_proj.weight",
)
GATE_UP_PACKED = PackedGatedMLPMapping(f"{MEGATRON}.mlp.linear_fc1.weight", f"{HF}.mlp.gate_up_proj.weight")
DOWN = RowParallelMapping(f"{MEGATRON}.mlp.linear_fc2.weight", f"{HF}.mlp.down_proj.weight")
MLP = (GATE_AND_UP, DOWN)

ROUTER = ReplicatedMapping(f"{MEGATRON}.mlp.router.weight", f"{HF}.mlp.gate.weight")


def routed_experts(
    module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[MegatronParamMapping, ...]:
    """The mappings of routed experts, which are in this module of a layer of the Hugging Face files."""
    megatron, hf = f"{MEGATRON}.mlp.experts", f"{HF}.{module}.*"
    return (
        GatedMLPMapping(f"{megatron}.linear_fc1.weight*", gate=f"{hf}.{gate}.weight", up=f"{hf}.{up}.weight"),
        RowParallelMapping(f"{megatron}.linear_fc2.weight*", f"{hf}.{down}.weight"),
    )


ROUTED_EXPERTS = routed_experts("mlp.experts")


def shared_experts(module: str) -> tuple[MegatronParamMapping, ...]:
    """The mappings of shared experts, which are this module in a layer of the Hugging Face files."""
    megatron, hf = f"{MEGATRON}.mlp.shared_experts", f"{HF}.{module}"
    return (
        GatedMLPMapping(f"{megatron}.linear_fc1.weight", gate=f"{hf}.gate_proj.weight", up=f"{hf}.up_proj.weight"),
        RowParallelMapping(f"{megatron}.linear_fc2.weight", f"{hf}.down_proj.weight"),
    )


NORMS_AFTER = "post_self_attn_layernorm", "post_mlp_layernorm"
"""Megatron's names of a layer's norms of what attention and MLP compute, before it is added to the residual."""


def norms_after(attention: str, mlp: str) -> tuple[ReplicatedMapping, ...]:
    """The mappings of norms after attention and MLP, which have these names in a layer of the Hugging Face files."""
    names = zip(NORMS_AFTER, (attention, mlp), strict=True)
    return tuple(ReplicatedMapping(f"{MEGATRON}.{norm}.weight", f"{HF}.{name}.weight") for norm, name in names)


WITH_NORMS_AFTER: dict[str, Source] = dict.fromkeys(NORMS_AFTER, fixed(True))
"""Settings of a model with these norms, named as the arguments of training frameworks that have them."""

OUTPUT = VocabParallelMapping("output_layer.weight", "lm_head.weight")
HEAD = (ReplicatedMapping("decoder.final_layernorm.weight", "model.norm.weight"), OUTPUT)


def head_dim(hf_config: HFConfig) -> int:
    """Columns of a head, as in transformers: by default the hidden size divided by the number of heads."""
    stated = hf_config.get("head_dim")
    return int(stated or look_up(hf_config, "hidden_size") // look_up(hf_config, "num_attention_heads"))


DECODER_SIZES: dict[str, Source] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": Translation(head_dim, lambda settings: {"head_dim": settings["kv_channels"]}),
    "layernorm_epsilon": "rms_norm_eps",
}

ONLY_EXPERTS: dict[str, Source] = {
    "moe_layer_freq": Translation(lambda hf_config: [1] * look_up(hf_config, "num_hidden_layers")),
    "moe_ffn_hidden_size": "intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
}
"""Every layer has experts, of width `intermediate_size`."""


def shared_width(count: str) -> Translation:
    """Megatron's `moe_shared_expert_intermediate_size`: all shared experts side by side, each as wide as a routed one.

    Args:
        count: the field with their number.
    """

    def write(settings: Settings) -> dict[str, Any]:
        return {count: (settings["moe_shared_expert_intermediate_size"] or 0) // settings["moe_ffn_hidden_size"]}

    return Translation(
        lambda hf_config: look_up(hf_config, "moe_intermediate_size") * (look_up(hf_config, count) or 0), write
    )


MODEL_ARGUMENTS: dict[str, Source] = {
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "position_embedding_type": fixed("rope"),
    "rotary_base": "rope_parameters.rope_theta",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}

PARTIAL_ROTARY = Translation(
    lambda hf_config: look_up(hf_config, "rope_parameters").get("partial_rotary_factor", 1.0),
    lambda settings: {"rope_parameters.partial_rotary_factor": settings["rotary_percent"]},
)
"""Megatron's `rotary_percent`: the share of each head's columns that is rotated."""

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _llama3_factor(hf_config: HFConfig) -> float | None:
    """The factor of Llama 3's rope scaling, None without scaling.

    Megatron takes the factor alone and fixes the rest:
    megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.

    Raises:
        UsageError: the scaling is of another type, or has other constants.
    """
    rope = look_up(hf_config, "rope_parameters")
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3" or any(rope.get(name) != value for name, value in _LLAMA3_ROPE.items()):
        numbers = ", ".join(f"{name}={value}" for name, value in _LLAMA3_ROPE.items())
        raise UsageError(f"Megatron's rotary embedding scales only as rope_type 'llama3' with {numbers}; found {rope}")
    return float(look_up(hf_config, "rope_parameters.factor"))


def _rope_parameters(settings: Settings) -> dict[str, Any]:
    scaled = {"rope_type": "llama3", "factor": settings["rope_scaling_factor"], **_LLAMA3_ROPE}
    rope = scaled if settings["rope_scaling"] else {"rope_type": "default"}
    return {f"rope_parameters.{name}": value for name, value in rope.items()}


ROPE_SCALING: dict[str, Source] = {
    "rope_scaling": Translation(lambda hf_config: _llama3_factor(hf_config) is not None, _rope_parameters),
    "rope_scaling_factor": Translation(lambda hf_config: _llama3_factor(hf_config) or 1.0),
}

GATED_RMSNORM_DECODER = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
}


SOFTMAX_OVER_ALL = Translation(
    lambda hf_config: not look_up(hf_config, "norm_topk_prob"),
    lambda settings: {"norm_topk_prob": not settings["moe_router_pre_softmax"]},
)
"""Megatron's `moe_router_pre_softmax` for a router that takes the top k of the softmax over all experts.

`norm_topk_prob` divides these k by their sum, which is the softmax over the chosen logits alone: Megatron's default.
"""

SOFTMAX_ROUTER = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
}

NO_BIASES = {"attention_bias": False, "mlp_bias": False}
"""The mappings above have no biases."""

PLAIN_DECODER = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "clip_qkv": None,
}
"""What `GATED_RMSNORM_DECODER` computes; a config could ask for something else."""


def _sliding_layers(hf_config: HFConfig) -> list[int]:
    """1 for each layer with sliding-window attention, 0 for each with full attention."""
    return [int(kind == "sliding_attention") for kind in look_up(hf_config, "layer_types")]


def _layer_types(settings: Settings) -> dict[str, Any]:
    slides = settings["window_attn_skip_freq"] or [1] * settings["num_layers"]
    return {"layer_types": ["sliding_attention" if each else "full_attention" for each in slides]}


WINDOW = Translation(
    lambda hf_config: (hf_config["sliding_window"] - 1, 0) if hf_config.get("sliding_window") else None,
    lambda settings: {"sliding_window": settings["window_size"] and settings["window_size"][0] + 1},
)
"""The number of keys that a query sees to its left and right; Hugging Face's `sliding_window` also counts its own."""

SLIDING_LAYERS: dict[str, Source] = {
    "window_size": WINDOW,
    "window_attn_skip_freq": Translation(_sliding_layers, _layer_types),
}


def layers_without_rope(field: str, *, marked: int) -> Translation:
    """Megatron's `no_rope_freq`: 1 for each layer without rotary embedding, None if there is none.

    Args:
        field: a list with a number for each layer.
        marked: the number of a layer without rotary embedding.
    """

    def read(hf_config: HFConfig) -> list[int] | None:
        layers = [int(each == marked) for each in look_up(hf_config, field)]
        return layers if any(layers) else None

    def write(settings: Settings) -> dict[str, Any]:
        layers = settings["no_rope_freq"] or [0] * settings["num_layers"]
        return {field: [marked if each else 1 - marked for each in layers]}

    return Translation(read, write)
