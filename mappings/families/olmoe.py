"""OLMoE: experts in every layer, and query and key norms over all heads of a token together."""

from mappings.families import parts
from mappings.family import ModelFamily

OLMOE = ModelFamily(
    architectures=("OlmoeForCausalLM",),
    mappings=(
        parts.EMBEDDING,
        *parts.QKV,
        *parts.QK_NORMS,
        parts.ATTENTION_OUTPUT,
        parts.MLP_NORM,
        parts.ROUTER,
        *parts.ROUTED_EXPERTS,
        *parts.HEAD,
    ),
    transformer={
        **parts.DECODER_SIZES,
        **parts.ONLY_EXPERTS,
        "num_moe_experts": "num_experts",
        "moe_router_pre_softmax": parts.SOFTMAX_OVER_ALL,
    },
    requires=parts.PLAIN_DECODER,
    model={**parts.MODEL_ARGUMENTS, **parts.ROPE_SCALING},
    constants={**parts.GATED_RMSNORM_DECODER, **parts.SOFTMAX_ROUTER, "qk_layernorm": True},
    norm_over_all_heads=True,
)
