"""Qwen3, dense: grouped-query attention with query and key norms, gated MLP, no biases."""

from mappings.family import ModelFamily
from mappings.weights import (
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
    VocabParallelMapping,
)

_MEGATRON = "decoder.layers.*"
_HF = "model.layers.*"

QWEN3 = ModelFamily(
    architectures=("Qwen3ForCausalLM",),
    mappings=(
        VocabParallelMapping("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ReplicatedMapping(f"{_MEGATRON}.input_layernorm.weight", f"{_HF}.input_layernorm.weight"),
        QKVMapping(
            f"{_MEGATRON}.self_attention.linear_qkv.weight",
            q=f"{_HF}.self_attn.q_proj.weight",
            k=f"{_HF}.self_attn.k_proj.weight",
            v=f"{_HF}.self_attn.v_proj.weight",
        ),
        ReplicatedMapping(f"{_MEGATRON}.self_attention.q_layernorm.weight", f"{_HF}.self_attn.q_norm.weight"),
        ReplicatedMapping(f"{_MEGATRON}.self_attention.k_layernorm.weight", f"{_HF}.self_attn.k_norm.weight"),
        RowParallelMapping(f"{_MEGATRON}.self_attention.linear_proj.weight", f"{_HF}.self_attn.o_proj.weight"),
        ReplicatedMapping(f"{_MEGATRON}.pre_mlp_layernorm.weight", f"{_HF}.post_attention_layernorm.weight"),
        GatedMLPMapping(
            f"{_MEGATRON}.mlp.linear_fc1.weight",
            gate=f"{_HF}.mlp.gate_proj.weight",
            up=f"{_HF}.mlp.up_proj.weight",
        ),
        RowParallelMapping(f"{_MEGATRON}.mlp.linear_fc2.weight", f"{_HF}.mlp.down_proj.weight"),
        ReplicatedMapping("decoder.final_layernorm.weight", "model.norm.weight"),
        VocabParallelMapping("output_layer.weight", "lm_head.weight"),
    ),
    transformer={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "layernorm_epsilon": "rms_norm_eps",
    },
    model={
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "rotary_base": "rope_parameters.rope_theta",
        "share_embeddings_and_output_weights": "tie_word_embeddings",
    },
    constants={
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "add_bias_linear": False,
    },
)
