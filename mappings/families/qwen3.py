"""Qwen3, dense: grouped-query attention with query and key norms, gated MLP, no biases."""

from mappings.families import parts
from mappings.family import ModelFamily

QWEN3 = ModelFamily(
    architectures=("Qwen3ForCausalLM",),
    mappings=(
        parts.EMBEDDING,
        *parts.QKV,
        *parts.QK_NORMS,
        parts.ATTENTION_OUTPUT,
        parts.MLP_NORM,
        *parts.MLP,
        *parts.HEAD,
    ),
    transformer=parts.DECODER_SIZES,
    requires=parts.PLAIN_DECODER,
    model={**parts.MODEL_ARGUMENTS, **parts.ROPE_SCALING},
    constants={**parts.GATED_RMSNORM_DECODER, "qk_layernorm": True},
)
