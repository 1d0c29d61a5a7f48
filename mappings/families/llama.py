"""Llama 2 and 3, and Mistral: grouped-query attention, gated MLP, no biases. Mistral 0.1 has a sliding window."""

from mappings.families import parts
from mappings.family import ModelFamily

LLAMA = ModelFamily(
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    mappings=(
        parts.EMBEDDING,
        *parts.QKV,
        parts.ATTENTION_OUTPUT,
        parts.MLP_NORM,
        *parts.MLP,
        *parts.HEAD,
    ),
    transformer=parts.DECODER_SIZES,
    derived=parts.plain_decoder,
    model={**parts.MODEL_ARGUMENTS, **parts.ROPE_SCALING},
    constants=parts.GATED_RMSNORM_DECODER,
)
