"""GLM-4, dense: half of each head is rotated, in pairs of columns. The newer one has norms after attention and MLP."""

from dataclasses import replace

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

_AFTER = {f"{decoder.MEGATRON}.{norm}.weight" for norm in decoder.NORMS_AFTER}
GLM = replace(
    GLM4,
    architectures=("GlmForCausalLM",),
    mappings=tuple(mapping for mapping in GLM4.mappings if mapping.megatron_param not in _AFTER),
    layers={},
    alike=("Ernie4_5ForCausalLM",),
)
