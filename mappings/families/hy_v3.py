"""Hunyuan 3 (HY-V3): Qwen3's attention; routed and shared experts behind a sigmoid router, after dense layers.

vLLM reads `expert_hidden_dim`, `route_norm` and `qk_norm`, which transformers does not know.
"""

from amaxbridge.mappings.families import decoder, sigmoid_experts
from amaxbridge.mappings.family import ModelFamily, Translation, fixed, look_up
from amaxbridge.mappings.weights import ReplicatedMapping

_MLP, _HF_MLP = f"{decoder.MEGATRON}.mlp", f"{decoder.HF}.mlp"


HY_V3 = ModelFamily(
    architectures=("HYV3ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        *decoder.QK_NORMS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        ReplicatedMapping(f"{_MLP}.router.weight", f"{_HF_MLP}.router.gate.weight"),
        ReplicatedMapping(f"{_MLP}.router.expert_bias", f"{_HF_MLP}.expert_bias"),
        *decoder.shared_experts("mlp.shared_mlp"),
        *decoder.ROUTED_EXPERTS,
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        "num_moe_experts": "num_experts",
        "moe_layer_freq": sigmoid_experts.LISTED_LAYERS,
        "moe_ffn_hidden_size": Translation(
            lambda hf_config: look_up(hf_config, "moe_intermediate_size"),
            lambda settings: dict.fromkeys(
                ("moe_intermediate_size", "expert_hidden_dim"), settings["moe_ffn_hidden_size"]
            ),
        ),
        "moe_router_score_function": fixed("sigmoid", route_norm=True, qk_norm=True),
        "moe_shared_expert_intermediate_size": decoder.shared_width("num_shared_experts"),
        "moe_router_topk": "num_experts_per_tok",
        "moe_router_topk_scaling_factor": Translation(
            lambda hf_config: look_up(hf_config, "router_scaling_factor"),
            lambda settings: {"router_scaling_factor": settings["moe_router_topk_scaling_factor"] or 1.0},
        ),
    },
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, **sigmoid_experts.ROUTER, "qk_layernorm": True},
    kept_in_fp32=("mlp.expert_bias",),
    alike=("Glm4MoeForCausalLM",),
)
