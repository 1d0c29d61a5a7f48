"""Qwen3, dense: grouped-query attention with query and key norms, gated MLP, no biases."""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily

QWEN3 = ModelFamily(
    architectures=("Qwen3ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        *decoder.QK_NORMS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        *decoder.HEAD,
    ),
    transformer=decoder.DECODER_SIZES,
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, "qk_layernorm": True},
)
