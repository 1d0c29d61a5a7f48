"""GLM-4.5 and 4.6: grouped-query attention that turns half of each head, and the experts of `sigmoid_experts`."""

from mappings.families import parts, sigmoid_experts
from mappings.family import ModelFamily

_LAYER = (
    *parts.QKV,
    parts.QKV_BIAS,
    *parts.QK_NORMS,
    parts.ATTENTION_OUTPUT,
    parts.MLP_NORM,
    *parts.MLP,
    *sigmoid_experts.EXPERTS,
)


GLM4_MOE = ModelFamily(
    architectures=("Glm4MoeForCausalLM",),
    mappings=(parts.EMBEDDING, *_LAYER, *parts.HEAD),
    exceptions=lambda hf_config: sigmoid_experts.mtp_layers(hf_config, _LAYER),
    transformer={
        **parts.DECODER_SIZES,
        **sigmoid_experts.SIZES,
        "add_qkv_bias": "attention_bias",
        "qk_layernorm": "use_qk_norm",
    },
    requires={"hidden_act": "silu", "norm_topk_prob": True},
    model={
        **parts.MODEL_ARGUMENTS,
        **parts.ROPE_SCALING,
        "rotary_percent": "rope_parameters.partial_rotary_factor",
    },
    constants={**parts.GATED_RMSNORM_DECODER, **sigmoid_experts.ROUTER},
)
