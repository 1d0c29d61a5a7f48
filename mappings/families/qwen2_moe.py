"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, a softmax router, and a shared expert behind a sigmoid gate."""

from mappings.families import parts
from mappings.families.qwen3_moe import SPARSE_LAYERS
from mappings.family import ModelFamily
from mappings.weights import GatedMLPMapping, ReplicatedMapping, RowParallelMapping

_SHARED, _HF_SHARED = f"{parts.MEGATRON}.mlp.shared_experts", f"{parts.HF}.mlp.shared_expert"

QWEN2_MOE = ModelFamily(
    architectures=("Qwen2MoeForCausalLM",),
    mappings=(
        parts.EMBEDDING,
        *parts.QKV,
        parts.QKV_BIAS,
        parts.ATTENTION_OUTPUT,
        parts.MLP_NORM,
        *parts.MLP,
        parts.ROUTER,
        *parts.ROUTED_EXPERTS,
        GatedMLPMapping(
            f"{_SHARED}.linear_fc1.weight",
            gate=f"{_HF_SHARED}.gate_proj.weight",
            up=f"{_HF_SHARED}.up_proj.weight",
        ),
        RowParallelMapping(f"{_SHARED}.linear_fc2.weight", f"{_HF_SHARED}.down_proj.weight"),
        ReplicatedMapping(f"{_SHARED}.gate_weight", f"{_HF_SHARED}_gate.weight"),
        *parts.HEAD,
    ),
    transformer={
        **parts.DECODER_SIZES,
        **SPARSE_LAYERS,
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        "add_qkv_bias": "qkv_bias",
    },
    requires=parts.PLAIN_DECODER,
    model={**parts.MODEL_ARGUMENTS, **parts.ROPE_SCALING},
    constants={**parts.GATED_RMSNORM_DECODER, **parts.SOFTMAX_ROUTER, "moe_shared_expert_gate": True},
)
