"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, a softmax router, and a shared expert behind a sigmoid gate."""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.qwen3_moe import SPARSE_LAYERS
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.weights import GatedMLPMapping, ReplicatedMapping, RowParallelMapping

_SHARED, _HF_SHARED = f"{decoder.MEGATRON}.mlp.shared_experts", f"{decoder.HF}.mlp.shared_expert"

SHARED_EXPERT: tuple[MegatronParamMapping, ...] = (
    GatedMLPMapping(
        f"{_SHARED}.linear_fc1.weight",
        gate=f"{_HF_SHARED}.gate_proj.weight",
        up=f"{_HF_SHARED}.up_proj.weight",
    ),
    RowParallelMapping(f"{_SHARED}.linear_fc2.weight", f"{_HF_SHARED}.down_proj.weight"),
    ReplicatedMapping(f"{_SHARED}.gate_weight", f"{_HF_SHARED}_gate.weight"),
)

QWEN2_MOE = ModelFamily(
    architectures=("Qwen2MoeForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.QKV_BIAS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        decoder.ROUTER,
        *decoder.ROUTED_EXPERTS,
        *SHARED_EXPERT,
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **SPARSE_LAYERS,
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        "add_qkv_bias": "qkv_bias",
    },
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, **decoder.SOFTMAX_ROUTER, "moe_shared_expert_gate": True},
)
