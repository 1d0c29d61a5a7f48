"""Qwen3-MoE: Qwen3's attention, and in place of the MLP a softmax router with gated experts; a layer may be dense."""

from typing import Any

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, Source, Translation, look_up
from amaxbridge.mappings.megatron_settings import Settings


def _experts(hf_config: HFConfig) -> Any:
    """The number of experts: `num_local_experts` in transformers 5.23, `num_experts` before and in most checkpoints."""
    return look_up(hf_config, "num_local_experts" if "num_local_experts" in hf_config else "num_experts")


def _moe_layers(hf_config: HFConfig) -> list[int]:
    """1 for each layer with experts, 0 for each dense one, as transformers' Qwen3MoeDecoderLayer chooses them."""
    dense, step = hf_config.get("mlp_only_layers") or (), hf_config.get("decoder_sparse_step", 1)
    layers = range(look_up(hf_config, "num_hidden_layers"))
    return [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]


def _dense_layers(settings: Settings) -> dict[str, Any]:
    dense = [layer for layer, sparse in enumerate(settings["moe_layer_freq"]) if not sparse]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


SPARSE_LAYERS: dict[str, Source] = {
    "num_moe_experts": Translation(_experts, lambda settings: {"num_experts": settings["num_moe_experts"]}),
    "moe_layer_freq": Translation(_moe_layers, _dense_layers),
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_pre_softmax": decoder.SOFTMAX_OVER_ALL,
}

QWEN3_MOE = ModelFamily(
    architectures=("Qwen3MoeForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        *decoder.QK_NORMS,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        decoder.ROUTER,
        *decoder.ROUTED_EXPERTS,
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **SPARSE_LAYERS,
    },
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, **decoder.SOFTMAX_ROUTER, "qk_layernorm": True},
)
