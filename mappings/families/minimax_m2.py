"""MiniMax-M2: query and key norms over all heads of a token together, part of each head rotated, sigmoid router.

Each layer has experts, which checkpoints call w1 (gate), w3 (up) and w2 (down).
"""

from typing import Any

from amaxbridge.mappings.families import decoder, sigmoid_experts
from amaxbridge.mappings.families.mixtral import EXPERTS
from amaxbridge.mappings.family import ModelFamily, Translation, fixed
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import ReplicatedMapping


def _rotary(settings: Settings) -> dict[str, Any]:
    """The share of a head that is rotated, and the number of its columns, as published."""
    columns = round(settings["kv_channels"] * settings["rotary_percent"])
    return {**decoder.PARTIAL_ROTARY.write(settings), "rotary_dim": columns}


MINIMAX_M2 = ModelFamily(
    architectures=("MiniMaxM2ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        *decoder.QK_NORMS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *EXPERTS,
        ReplicatedMapping(
            f"{decoder.MEGATRON}.mlp.router.expert_bias", f"{decoder.HF}.block_sparse_moe.e_score_correction_bias"
        ),
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **decoder.ONLY_EXPERTS,
        "num_moe_experts": "num_local_experts",
        "moe_router_score_function": fixed("sigmoid", scoring_func="sigmoid", use_routing_bias=True, use_qk_norm=True),
    },
    requires={
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
    },
    computes={**decoder.PLAIN_DECODER, "scoring_func": "sigmoid"},
    model={
        **decoder.MODEL_ARGUMENTS,
        **decoder.ROPE_SCALING,
        "rotary_percent": Translation(decoder.PARTIAL_ROTARY.read, _rotary),
    },
    constants={**decoder.GATED_RMSNORM_DECODER, **sigmoid_experts.ROUTER, "qk_layernorm": True},
    norm_over_all_heads=True,
    kept_in_fp32=sigmoid_experts.KEPT_IN_FP32,
)
