"""Qwen2 and Qwen2.5, dense, and Seed-OSS: a Llama whose query, key and value projections have biases."""

from dataclasses import replace

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily

QWEN2 = ModelFamily(
    architectures=("Qwen2ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.QKV_BIAS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        *decoder.HEAD,
    ),
    transformer=decoder.DECODER_SIZES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, "add_qkv_bias": True},
)

SEED_OSS = replace(
    QWEN2,
    architectures=("SeedOssForCausalLM",),
    requires={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
)
