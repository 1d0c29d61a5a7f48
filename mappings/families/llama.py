"""Llama 2 and 3, and Mistral: grouped-query attention, gated MLP, no biases. Mistral 0.1 has a sliding window."""

from dataclasses import replace

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily

LLAMA = ModelFamily(
    architectures=("LlamaForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        *decoder.HEAD,
    ),
    transformer=decoder.DECODER_SIZES,
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants=decoder.GATED_RMSNORM_DECODER,
)

MISTRAL = replace(
    LLAMA,
    architectures=("MistralForCausalLM",),
    transformer={**decoder.DECODER_SIZES, "window_size": decoder.WINDOW},
)
