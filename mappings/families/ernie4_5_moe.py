"""ERNIE-4.5 with experts: ERNIE-4.5's attention; routed and shared experts in some layers.

The router takes the top k of the softmax over all experts plus a bias for each, in checkpoints `[1, experts]`.
Megatron-Core adds such a bias to sigmoid scores only: the model is exported, and refused where a model is built.
"""

from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, Translation, look_up
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import RowOfMatrixMapping

_MLP, _HF_MLP = f"{decoder.MEGATRON}.mlp", f"{decoder.HF}.mlp"
_BIAS = "moe_statics.e_score_correction_bias"


def _moe_layers(hf_config: HFConfig) -> list[int]:
    """1 for each layer with experts, 0 for each dense one, as transformers' Ernie4_5_MoeDecoderLayer chooses them."""
    first, last, every = (
        look_up(hf_config, f"moe_layer_{field}") for field in ("start_index", "end_index", "interval")
    )
    layers = range(look_up(hf_config, "num_hidden_layers"))
    last = layers[-1] if last == -1 else last
    return [int((layer + 1) % every == 0 and first <= layer <= last) for layer in layers]


def _dense_layers(settings: Settings) -> dict[str, Any]:
    sparse = [layer for layer, each in enumerate(settings["moe_layer_freq"]) if each]
    every = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": every}


def _check(hf_config: HFConfig) -> None:
    raise UsageError("the router adds a bias to softmax scores, which Megatron's layers do for sigmoid scores only")


ERNIE4_5_MOE = ModelFamily(
    architectures=("Ernie4_5_MoeForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        decoder.ROUTER,
        RowOfMatrixMapping(f"{_MLP}.router.expert_bias", f"{_HF_MLP}.{_BIAS}"),
        *decoder.shared_experts("mlp.shared_experts"),
        *decoder.ROUTED_EXPERTS,
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        "num_moe_experts": "moe_num_experts",
        "moe_layer_freq": Translation(_moe_layers, _dense_layers),
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": decoder.shared_width("moe_num_shared_experts"),
        "moe_router_topk": "moe_k",
    },
    requires={"use_bias": False},
    computes=decoder.PLAIN_DECODER,
    check=_check,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={
        **decoder.GATED_RMSNORM_DECODER,
        **decoder.SOFTMAX_ROUTER,
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "rotary_interleaved": True,
    },
    kept_in_fp32=(_BIAS,),
)
