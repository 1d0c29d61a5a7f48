"""Mixtral: Llama's attention, and experts in every layer, which checkpoints call w1 (gate), w3 (up) and w2 (down)."""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.weights import ReplicatedMapping

EXPERTS = (
    ReplicatedMapping(f"{decoder.MEGATRON}.mlp.router.weight", f"{decoder.HF}.block_sparse_moe.gate.weight"),
    *decoder.routed_experts("block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
)

MIXTRAL = ModelFamily(
    architectures=("MixtralForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *EXPERTS,
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **decoder.ONLY_EXPERTS,
        "num_moe_experts": "num_local_experts",
        "window_size": decoder.WINDOW,
    },
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, **decoder.SOFTMAX_ROUTER, "moe_router_pre_softmax": False},
)
