"""What the families share: the pieces of a decoder that most of them name alike, in Megatron and in Hugging Face.

A family lists the pieces it has and adds its own. The tables below the mappings give the same sizes their names in
Megatron's configuration, and say which of a config's features Megatron computes as transformers does.
"""

from collections.abc import Mapping
from typing import Any

from mappings.errors import UsageError
from mappings.family import Source, look_up, require
from mappings.weights import (
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
    VocabParallelMapping,
)

MEGATRON = "decoder.layers.*"
HF = "model.layers.*"

EMBEDDING = VocabParallelMapping("embedding.word_embeddings.weight", "model.embed_tokens.weight")

QKV = (
    ReplicatedMapping(f"{MEGATRON}.input_layernorm.weight", f"{HF}.input_layernorm.weight"),
    QKVMapping(
        f"{MEGATRON}.self_attention.linear_qkv.weight",
        q=f"{HF}.self_attn.q_proj.weight",
        k=f"{HF}.self_attn.k_proj.weight",
        v=f"{HF}.self_attn.v_proj.weight",
    ),
)
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
MLP = (
    GatedMLPMapping(
        f"{MEGATRON}.mlp.linear_fc1.weight",
        gate=f"{HF}.mlp.gate_proj.weight",
        up=f"{HF}.mlp.up_proj.weight",
    ),
    RowParallelMapping(f"{MEGATRON}.mlp.linear_fc2.weight", f"{HF}.mlp.down_proj.weight"),
)

ROUTER = ReplicatedMapping(f"{MEGATRON}.mlp.router.weight", f"{HF}.mlp.gate.weight")
ROUTED_EXPERTS = (
    GatedMLPMapping(
        f"{MEGATRON}.mlp.experts.linear_fc1.weight*",
        gate=f"{HF}.mlp.experts.*.gate_proj.weight",
        up=f"{HF}.mlp.experts.*.up_proj.weight",
    ),
    RowParallelMapping(f"{MEGATRON}.mlp.experts.linear_fc2.weight*", f"{HF}.mlp.experts.*.down_proj.weight"),
)

OUTPUT = VocabParallelMapping("output_layer.weight", "lm_head.weight")
HEAD = (ReplicatedMapping("decoder.final_layernorm.weight", "model.norm.weight"), OUTPUT)


def head_dim(hf_config: Mapping[str, Any]) -> int:
    """As transformers' attention layers have it: the hidden size is divided among the heads where nothing is said."""
    return int(hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"])


DECODER_SIZES: dict[str, Source] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": head_dim,
    "layernorm_epsilon": "rms_norm_eps",
}

ONLY_EXPERTS: dict[str, Source] = {
    "moe_layer_freq": lambda hf_config: [1] * hf_config["num_hidden_layers"],
    "moe_ffn_hidden_size": "intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
}
"""Every layer has experts, as wide as `intermediate_size` says."""

MODEL_ARGUMENTS: dict[str, Source] = {
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "rotary_base": "rope_parameters.rope_theta",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _llama3_factor(hf_config: Mapping[str, Any]) -> float | None:
    """The factor of Llama 3's rope scaling, None without scaling.

    Megatron takes the factor alone and fixes the rest:
    megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.

    Raises:
        UsageError: another scaling, or other fixed numbers.
    """
    rope = look_up(hf_config, "rope_parameters")
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3" or any(rope.get(name) != value for name, value in _LLAMA3_ROPE.items()):
        numbers = ", ".join(f"{name}={value}" for name, value in _LLAMA3_ROPE.items())
        raise UsageError(f"Megatron's rotary embedding scales only as rope_type 'llama3' with {numbers}; found {rope}")
    return float(rope["factor"])


ROPE_SCALING: dict[str, Source] = {
    "rope_scaling": lambda hf_config: _llama3_factor(hf_config) is not None,
    "rope_scaling_factor": lambda hf_config: _llama3_factor(hf_config) or 1.0,
}

GATED_RMSNORM_DECODER = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
}


def softmax_over_all(hf_config: Mapping[str, Any]) -> bool:
    """Megatron's `moe_router_pre_softmax` for a router that takes the top k of the softmax over all experts.

    `norm_topk_prob` divides those by their sum, which is the softmax over the chosen logits alone: Megatron's default.
    """
    return not hf_config["norm_topk_prob"]


SOFTMAX_ROUTER = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
}


def plain_decoder(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for one sliding window over all layers, where there is one.

    Raises:
        UsageError: a feature that `GATED_RMSNORM_DECODER` does not have.
    """
    require(hf_config, hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False, clip_qkv=None)
    return {"window_size": window(hf_config)} if hf_config.get("sliding_window") else {}


def sliding_layers(hf_config: Mapping[str, Any]) -> list[int]:
    """1 for each layer with sliding-window attention, 0 for each with full attention."""
    return [int(kind == "sliding_attention") for kind in hf_config["layer_types"]]


def window(hf_config: Mapping[str, Any]) -> tuple[int, int]:
    """Keys to the left and right of a query that it sees; Hugging Face's `sliding_window` counts its own, too."""
    return hf_config["sliding_window"] - 1, 0
