"""Qwen3-Next: gated delta nets, every fourth layer gated attention, and Qwen2-MoE's experts with a gated shared expert.

All norms multiply by `1 + weight` in Megatron, and in Hugging Face all but that of a gated delta net's outputs. A layer
for multi-token prediction (MTP) is a layer of gated attention under names of its own; transformers does not build it.
"""

from collections.abc import Iterator
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.qwen2_moe import SHARED_EXPERT
from amaxbridge.mappings.families.qwen3_moe import SPARSE_LAYERS
from amaxbridge.mappings.family import HFConfig, ModelFamily, Source, Translation, look_up
from amaxbridge.mappings.gated_delta_net import (
    DeltaConvolutionMapping,
    InterleavedDeltaProjectionMapping,
    ZeroCentredNormMapping,
)
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import ColumnParallelMapping, ReplicatedMapping, RowParallelMapping

_DELTA, _HF_DELTA = f"{decoder.MEGATRON}.self_attention", f"{decoder.HF}.linear_attn"

DELTA_NET: tuple[MegatronParamMapping, ...] = (
    DeltaConvolutionMapping(f"{_DELTA}.conv1d.weight", f"{_HF_DELTA}.conv1d.weight"),
    ColumnParallelMapping(f"{_DELTA}.A_log", f"{_HF_DELTA}.A_log"),
    ColumnParallelMapping(f"{_DELTA}.dt_bias", f"{_HF_DELTA}.dt_bias"),
    ZeroCentredNormMapping(f"{_DELTA}.out_norm.weight", f"{_HF_DELTA}.norm.weight"),
    RowParallelMapping(f"{_DELTA}.out_proj.weight", f"{_HF_DELTA}.out_proj.weight"),
)
"""A gated delta net without its input projection, which Qwen3-Next and Qwen3.5 have in different forms."""

ATTENTION_LAYER: tuple[MegatronParamMapping, ...] = (
    *decoder.QKV,
    *decoder.QK_NORMS,
    decoder.ATTENTION_OUTPUT,
    decoder.MLP_NORM,
)
EXPERTS: tuple[MegatronParamMapping, ...] = (decoder.ROUTER, *decoder.ROUTED_EXPERTS, *SHARED_EXPERT)

_MTP = "mtp.layers.*"
_AROUND_MTP = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "final_layernorm": "norm",
}


def mtp_layer(*layer: MegatronParamMapping) -> Iterator[MegatronParamMapping]:
    """The mappings of an MTP layer, made from those of a decoder layer. Hugging Face has one projection for all."""
    for mapping in layer:
        megatron_param = mapping.megatron_param.replace(decoder.MEGATRON, f"{_MTP}.mtp_model_layer")
        yield mapping.rename(megatron_param, lambda name: name.replace(decoder.HF, _MTP))
    yield ColumnParallelMapping("mtp.layers.0.eh_proj.weight", "mtp.fc.weight")
    for megatron, hf in _AROUND_MTP.items():
        yield ReplicatedMapping(f"mtp.layers.0.{megatron}.weight", f"mtp.{hf}.weight")


def mtp_count(field: str) -> Translation:
    """`mtp_num_layers` of a model whose config.json counts MTP layers in this field."""

    def read(hf_config: HFConfig) -> int | None:
        count: int | None = hf_config.get(field) or None  # Megatron has None in place of 0
        if count is not None and count > 1:
            raise UsageError(
                f"{field}={count}: each of Megatron's MTP layers has a projection, but the files one for all; "
                f"correct config.json, or export without MTP layers ({field}=0)"
            )
        return count

    return Translation(read, lambda settings: {field: settings["mtp_num_layers"] or 0})


def _linear_layers(hf_config: HFConfig) -> list[int]:
    """1 for each layer with a gated delta net, 0 for each with attention.

    Raises:
        UsageError: a layer is of another kind.
    """
    kinds = look_up(hf_config, "layer_types")
    if unknown := set(kinds) - {"linear_attention", "full_attention"}:
        raise UsageError(f"layer_types has {', '.join(sorted(unknown))}; known: linear_attention, full_attention")
    return [int(kind == "linear_attention") for kind in kinds]


def _layer_types(settings: Settings) -> dict[str, Any]:
    """The layers by kind, and where they recur also by the distance between layers with attention.

    SGLang reads only the distance.
    """
    linear = list(settings["linear_attention_freq"] or [0] * settings["num_layers"])
    types = {"layer_types": ["linear_attention" if each else "full_attention" for each in linear]}
    if 0 not in linear:
        return types
    every = linear.index(0) + 1
    regular = linear == [int((layer + 1) % every != 0) for layer in range(len(linear))]
    return {**types, "full_attention_interval": every} if regular else types


DELTA_SIZES: dict[str, Source] = {
    "linear_attention_freq": Translation(_linear_layers, _layer_types),
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
}

MODEL_ARGUMENTS: dict[str, Source] = {
    **decoder.MODEL_ARGUMENTS,
    **decoder.ROPE_SCALING,
    "rotary_percent": "rope_parameters.partial_rotary_factor",
}

CONSTANTS = {
    **decoder.GATED_RMSNORM_DECODER,
    "layernorm_zero_centered_gamma": True,
    "qk_layernorm": True,
    "attention_output_gate": True,
    "experimental_attention_variant": "gated_delta_net",
}

QWEN3_NEXT = ModelFamily(
    architectures=("Qwen3NextForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *ATTENTION_LAYER,
        InterleavedDeltaProjectionMapping(
            f"{_DELTA}.in_proj.weight", qkvz=f"{_HF_DELTA}.in_proj_qkvz.weight", ba=f"{_HF_DELTA}.in_proj_ba.weight"
        ),
        *DELTA_NET,
        *decoder.MLP,
        *EXPERTS,
        *decoder.HEAD,
        *mtp_layer(*ATTENTION_LAYER, *decoder.MLP, *EXPERTS),
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **SPARSE_LAYERS,
        **DELTA_SIZES,
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        "mtp_num_layers": mtp_count("num_nextn_predict_layers"),
    },
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model=MODEL_ARGUMENTS,
    constants={**CONSTANTS, **decoder.SOFTMAX_ROUTER, "moe_shared_expert_gate": True},
)
