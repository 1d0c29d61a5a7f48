"""Hunyuan 3 (HY-V3): Qwen3's attention; routed and shared experts behind a sigmoid router, after dense layers."""

from typing import Any

from amaxbridge.mappings.families import decoder, sigmoid_experts
from amaxbridge.mappings.family import HFConfig, ModelFamily, Translation, look_up
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import GatedMLPMapping, ReplicatedMapping, RowParallelMapping

_MLP, _HF_MLP = f"{decoder.MEGATRON}.mlp", f"{decoder.HF}.mlp"


def _shared_width(hf_config: HFConfig) -> int:
    return int(look_up(hf_config, "moe_intermediate_size") * look_up(hf_config, "num_shared_experts"))


def _shared_experts(settings: Settings) -> dict[str, Any]:
    width = settings["moe_shared_expert_intermediate_size"] or 0
    return {"num_shared_experts": width // settings["moe_ffn_hidden_size"]}


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
        GatedMLPMapping(
            f"{_MLP}.shared_experts.linear_fc1.weight",
            gate=f"{_HF_MLP}.shared_mlp.gate_proj.weight",
            up=f"{_HF_MLP}.shared_mlp.up_proj.weight",
        ),
        RowParallelMapping(f"{_MLP}.shared_experts.linear_fc2.weight", f"{_HF_MLP}.shared_mlp.down_proj.weight"),
        *decoder.ROUTED_EXPERTS,
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        "num_moe_experts": "num_experts",
        "moe_layer_freq": sigmoid_experts.LISTED_LAYERS,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": Translation(_shared_width, _shared_experts),
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
