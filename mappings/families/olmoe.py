"""OLMoE: experts in every layer, and query and key norms over all heads of a token together."""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily

OLMOE = ModelFamily(
    architectures=("OlmoeForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        *decoder.QK_NORMS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        decoder.ROUTER,
        *decoder.ROUTED_EXPERTS,
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **decoder.ONLY_EXPERTS,
        "num_moe_experts": "num_experts",
        "moe_router_pre_softmax": decoder.SOFTMAX_OVER_ALL,
    },
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, **decoder.SOFTMAX_ROUTER, "qk_layernorm": True},
    norm_over_all_heads=True,
)
