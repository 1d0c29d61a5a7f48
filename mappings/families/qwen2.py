"""Qwen2 and Qwen2.5, dense: a Llama whose query, key and value projections have biases."""

from mappings.families import parts
from mappings.family import ModelFamily

QWEN2 = ModelFamily(
    architectures=("Qwen2ForCausalLM",),
    mappings=(
        parts.EMBEDDING,
        *parts.QKV,
        parts.QKV_BIAS,
        parts.ATTENTION_OUTPUT,
        parts.MLP_NORM,
        *parts.MLP,
        *parts.HEAD,
    ),
    transformer=parts.DECODER_SIZES,
    requires=parts.PLAIN_DECODER,
    model={**parts.MODEL_ARGUMENTS, **parts.ROPE_SCALING},
    constants={**parts.GATED_RMSNORM_DECODER, "add_qkv_bias": True},
)
