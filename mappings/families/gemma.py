"""Gemma 2 and Gemma 3: norms before and after attention and MLP, all of them times `1 + weight`.

Megatron has the language model of a multimodal Gemma 3; exports copy the rest unchanged.

Megatron stores the weight of a zero-centred norm as Hugging Face does, so no value changes. A norm after a linear
belongs to that linear in Megatron's names, as in NVIDIA's Megatron-Bridge: `linear_proj.post_layernorm`. Megatron-Core
itself has no such layers; `bridge/megatron/gemma_layers.py` builds them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, Source, Translation, fixed, look_up
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import ReplicatedMapping

_LAYER = (
    *decoder.QKV,
    decoder.ATTENTION_OUTPUT,
    ReplicatedMapping(
        f"{decoder.MEGATRON}.self_attention.linear_proj.post_layernorm.weight",
        f"{decoder.HF}.post_attention_layernorm.weight",
    ),
    ReplicatedMapping(f"{decoder.MEGATRON}.pre_mlp_layernorm.weight", f"{decoder.HF}.pre_feedforward_layernorm.weight"),
    *decoder.MLP,
    ReplicatedMapping(
        f"{decoder.MEGATRON}.mlp.linear_fc2.post_layernorm.weight", f"{decoder.HF}.post_feedforward_layernorm.weight"
    ),
)


def _scalar(settings: Settings) -> dict[str, Any]:
    """`query_pre_attn_scalar` of the softmax scale: the integer that gives this scale, if one does."""
    scale = settings["softmax_scale"] or settings["kv_channels"] ** -0.5
    whole = round(scale**-2)
    return {"query_pre_attn_scalar": whole if whole**-0.5 == scale else scale**-2}


_CONSTANTS = {**decoder.GATED_RMSNORM_DECODER, "layernorm_zero_centered_gamma": True}
_LAYERS: Mapping[str, Source] = {
    "softmax_scale": Translation(lambda hf_config: look_up(hf_config, "query_pre_attn_scalar") ** -0.5, _scalar),
    **decoder.SLIDING_LAYERS,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ACTIVATION = "gelu_pytorch_tanh"
_REQUIRES = {"attention_bias": False}
_COMPUTES = {"hidden_activation": _ACTIVATION}


def _check(hf_config: HFConfig) -> None:
    if hf_config.get("use_bidirectional_attention"):
        raise UsageError("use_bidirectional_attention is set, but Megatron's layers attend to earlier tokens only")


def _interpolation(hf_config: HFConfig) -> float | None:
    """The factor that divides positions in full-attention layers; None without scaling.

    Raises:
        UsageError: Megatron lacks this rotary embedding.
    """
    rope, local = (look_up(hf_config, f"rope_parameters.{kind}_attention") for kind in ("full", "sliding"))
    if rope.get("type", rope.get("rope_type")) != rope.get("rope_type"):  # as transformers reads the older spelling
        raise UsageError(f"rope_scaling says type={rope['type']!r}, which transformers ignores: write rope_type=")
    if rope.get("rope_type") not in ("default", "linear") or local.get("rope_type") != "default":
        raise UsageError(f"Gemma layers scale full attention only, and linearly; found {rope} and {local}")
    return look_up(rope, "factor") if rope["rope_type"] == "linear" else None


def _interpolated(settings: Settings) -> dict[str, Any]:
    factor, full = settings["seq_len_interpolation_factor"], "rope_parameters.full_attention"
    scaling = {f"{full}.rope_type": "linear", f"{full}.factor": factor} if factor else {f"{full}.rope_type": "default"}
    return {**scaling, "rope_parameters.sliding_attention.rope_type": "default"}


GEMMA2 = ModelFamily(
    architectures=("Gemma2ForCausalLM",),
    mappings=(decoder.EMBEDDING, *_LAYER, *decoder.HEAD),
    transformer=decoder.DECODER_SIZES,
    requires=_REQUIRES,
    computes=_COMPUTES,
    check=_check,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants=_CONSTANTS,
    layers=_LAYERS,
    activation=_ACTIVATION,
    model_class="gemma",
)

GEMMA3 = ModelFamily(
    architectures=("Gemma3ForCausalLM",),
    mappings=(decoder.EMBEDDING, *_LAYER, *decoder.QK_NORMS, *decoder.HEAD),
    transformer=decoder.DECODER_SIZES,
    requires=_REQUIRES,
    computes=_COMPUTES,
    check=_check,
    model={
        **decoder.MODEL_ARGUMENTS,
        "rotary_base": "rope_parameters.full_attention.rope_theta",
        "seq_len_interpolation_factor": Translation(_interpolation, _interpolated),
    },
    constants=_CONSTANTS,
    layers={
        **_LAYERS,
        "qk_layernorm": fixed(True),
        "rotary_base_local": "rope_parameters.sliding_attention.rope_theta",
    },
    activation=_ACTIVATION,
    model_class="gemma",
)

GEMMA3_MULTIMODAL = replace(
    GEMMA3,
    architectures=("Gemma3ForConditionalGeneration",),
    mappings=tuple(
        mapping.rename(mapping.megatron_param, lambda name: f"language_model.{name}") for mapping in GEMMA3.mappings
    ),
    language_part="text_config",
    carried=("vision_tower.", "multi_modal_projector."),
)
