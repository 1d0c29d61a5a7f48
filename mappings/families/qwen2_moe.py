"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, a softmax router, and a shared expert behind a sigmoid gate."""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.qwen3_moe import SPARSE_LAYERS
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.weights import ReplicatedMapping

SHARED_EXPERT: tuple[MegatronParamMapping, ...] = (
    *decoder.shared_experts("mlp.shared_expert"),
    ReplicatedMapping(
        f"{decoder.MEGATRON}.mlp.shared_experts.gate_weight", f"{decoder.HF}.mlp.shared_expert_gate.weight"
    ),
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
