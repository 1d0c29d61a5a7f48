"""Llama 2 and 3, and Mistral: grouped-query attention, gated MLP, no biases. Mistral 0.1 has a sliding window."""

from dataclasses import replace

from mappings.families import parts
from mappings.family import ModelFamily

LLAMA = ModelFamily(
    architectures=("LlamaForCausalLM",),
    mappings=(
        parts.EMBEDDING,
        *parts.QKV,
        parts.ATTENTION_OUTPUT,
        parts.MLP_NORM,
        *parts.MLP,
        *parts.HEAD,
    ),
    transformer=parts.DECODER_SIZES,
    requires=parts.PLAIN_DECODER,
    model={**parts.MODEL_ARGUMENTS, **parts.ROPE_SCALING},
    constants=parts.GATED_RMSNORM_DECODER,
)

MISTRAL = replace(
    LLAMA,
    architectures=("MistralForCausalLM",),
    transformer={**parts.DECODER_SIZES, "window_size": parts.WINDOW},
)
