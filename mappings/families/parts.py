"""What the families share: the pieces of a decoder that most of them name alike, in Megatron and in Hugging Face.

A family lists the pieces it has and adds its own. The tables below the mappings give the same sizes their names in
Megatron's configuration.
"""

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

DECODER_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
}

MODEL_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "rotary_base": "rope_parameters.rope_theta",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}

GATED_RMSNORM_DECODER = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
}
