"""GLM-4, dense: norms before and after attention and MLP; half of each head is rotated, in pairs of columns."""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily

GLM4 = ModelFamily(
    architectures=("Glm4ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.QKV_BIAS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        decoder.GATE_UP_PACKED,
        decoder.DOWN,
        *decoder.norms_after("post_self_attn_layernorm", "post_mlp_layernorm"),
        *decoder.HEAD,
    ),
    transformer={**decoder.DECODER_SIZES, "add_qkv_bias": "attention_bias"},
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING, "rotary_percent": decoder.PARTIAL_ROTARY},
    constants={**decoder.GATED_RMSNORM_DECODER, "rotary_interleaved": True},
    layers=decoder.WITH_NORMS_AFTER,
)
