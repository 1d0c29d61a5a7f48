"""DeepSeek-V3, Moonlight and Kimi-K2: latent attention, and the experts and MTP layers of `sigmoid_experts`."""

from amaxbridge.mappings.families import decoder, latent_attention, sigmoid_experts
from amaxbridge.mappings.family import ModelFamily

LAYER = (*latent_attention.ATTENTION, decoder.MLP_NORM, *decoder.MLP, *sigmoid_experts.EXPERTS)

DEEPSEEK_V3 = ModelFamily(
    architectures=("DeepseekV3ForCausalLM",),
    mappings=(decoder.EMBEDDING, *LAYER, *decoder.HEAD),
    exceptions=lambda hf_config: sigmoid_experts.mtp_layers(hf_config, LAYER),
    transformer={**latent_attention.SIZES, **sigmoid_experts.SIZES, **sigmoid_experts.SPELLED_ROUTER},
    requires={"attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1},
    computed=latent_attention.ROPE,
    computes=sigmoid_experts.COMPUTES,
    check=sigmoid_experts.check_router,
    model=decoder.MODEL_ARGUMENTS,
    constants={**latent_attention.CONSTANTS, "moe_router_enable_expert_bias": True},
    kept_in_fp32=sigmoid_experts.KEPT_IN_FP32,
)
