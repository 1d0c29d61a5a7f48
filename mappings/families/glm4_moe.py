"""GLM-4.5 and 4.6, and dots.llm1: grouped-query attention and the experts of `sigmoid_experts`.

GLM rotates half of each head; dots has no MTP layers and no biases.
"""

from dataclasses import replace

from amaxbridge.mappings.families import decoder, sigmoid_experts
from amaxbridge.mappings.family import ModelFamily, Translation

_LAYER = (
    *decoder.QKV,
    decoder.QKV_BIAS,
    *decoder.QK_NORMS,
    decoder.ATTENTION_OUTPUT,
    decoder.MLP_NORM,
    *decoder.MLP,
    *sigmoid_experts.EXPERTS,
)


GLM4_MOE = ModelFamily(
    architectures=("Glm4MoeForCausalLM",),
    mappings=(decoder.EMBEDDING, *_LAYER, *decoder.HEAD),
    exceptions=lambda hf_config: sigmoid_experts.mtp_layers(hf_config, _LAYER),
    transformer={
        **decoder.DECODER_SIZES,
        **sigmoid_experts.SIZES,
        "add_qkv_bias": "attention_bias",
        "qk_layernorm": "use_qk_norm",
    },
    computes=sigmoid_experts.COMPUTES,
    check=sigmoid_experts.check_router,
    model={
        **decoder.MODEL_ARGUMENTS,
        **decoder.ROPE_SCALING,
        "rotary_percent": "rope_parameters.partial_rotary_factor",
    },
    constants={**decoder.GATED_RMSNORM_DECODER, **sigmoid_experts.ROUTER},
    kept_in_fp32=sigmoid_experts.KEPT_IN_FP32,
)

DOTS1 = replace(
    GLM4_MOE,
    architectures=("Dots1ForCausalLM",),
    mappings=tuple(mapping for mapping in GLM4_MOE.mappings if mapping is not decoder.QKV_BIAS),
    exceptions=lambda hf_config: (),
    transformer={**decoder.DECODER_SIZES, **sigmoid_experts.SIZES},
    requires=decoder.NO_BIASES,
    computed=Translation(lambda hf_config: {}, lambda settings: {"norm_topk_prob": True}),  # not transformers' default
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**GLM4_MOE.constants, "qk_layernorm": True},
    layers=decoder.SLIDING_LAYERS,
    alike=("Glm4MoeForCausalLM",),
)
