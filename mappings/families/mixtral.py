"""Mixtral: Llama's attention, and experts in every layer, which checkpoints call w1 (gate), w3 (up) and w2 (down)."""

from mappings.families import parts
from mappings.family import ModelFamily
from mappings.weights import GatedMLPMapping, ReplicatedMapping, RowParallelMapping

_MOE, _HF_MOE = f"{parts.MEGATRON}.mlp", f"{parts.HF}.block_sparse_moe"

MIXTRAL = ModelFamily(
    architectures=("MixtralForCausalLM",),
    mappings=(
        parts.EMBEDDING,
        *parts.QKV,
        parts.ATTENTION_OUTPUT,
        parts.MLP_NORM,
        ReplicatedMapping(f"{_MOE}.router.weight", f"{_HF_MOE}.gate.weight"),
        GatedMLPMapping(
            f"{_MOE}.experts.linear_fc1.weight*",
            gate=f"{_HF_MOE}.experts.*.w1.weight",
            up=f"{_HF_MOE}.experts.*.w3.weight",
        ),
        RowParallelMapping(f"{_MOE}.experts.linear_fc2.weight*", f"{_HF_MOE}.experts.*.w2.weight"),
        *parts.HEAD,
    ),
    transformer={
        **parts.DECODER_SIZES,
        **parts.ONLY_EXPERTS,
        "num_moe_experts": "num_local_experts",
        "window_size": parts.WINDOW,
    },
    requires=parts.PLAIN_DECODER,
    model={**parts.MODEL_ARGUMENTS, **parts.ROPE_SCALING},
    constants={**parts.GATED_RMSNORM_DECODER, **parts.SOFTMAX_ROUTER, "moe_router_pre_softmax": False},
)
