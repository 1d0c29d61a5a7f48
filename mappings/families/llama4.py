"""Llama 4, with images or without: chunked attention with rotary embedding, and full attention without it.

Layers with rotary embedding attend within chunks of the sequence and may normalize queries and keys; layers without
scale queries by their position. A token goes to one routed expert, whose input is multiplied by the router's sigmoid
score, and to a shared expert; other layers may be dense. Plain files hold the experts of a layer as one tensor, inputs
first. Megatron-Core lacks the chunks and the scale: `bridge/megatron/llama4_attention.py`. Of the model with images
Megatron has the language model; exports copy the rest unchanged.
"""

from dataclasses import replace
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, PackedExperts, Translation, look_up
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import GatedMLPMapping, ReplicatedMapping, RowParallelMapping

_MLP, _HF_MLP = f"{decoder.MEGATRON}.mlp", f"{decoder.HF}.feed_forward"


def _moe_layers(hf_config: HFConfig) -> list[int]:
    """1 for each layer with experts, 0 for each dense one."""
    sparse = look_up(hf_config, "moe_layers")
    return [int(layer in sparse) for layer in range(look_up(hf_config, "num_hidden_layers"))]


def _sparse_layers(settings: Settings) -> dict[str, Any]:
    """The layers by number, and where they recur also by their distance, which is all that vLLM reads."""
    layers, count = [number for number, each in enumerate(settings["moe_layer_freq"]) if each], settings["num_layers"]
    step = layers[0] + 1 if layers else count + 1
    regular = layers == list(range(step - 1, count, step))
    return {"moe_layers": layers, **({"interleave_moe_layer_step": step} if regular else {})}


def _check(hf_config: HFConfig) -> None:
    """Raises UsageError if attention is chunked in other layers than those with rotary embedding."""
    chunked = [kind == "chunked_attention" for kind in look_up(hf_config, "layer_types")]
    if hf_config.get("attention_chunk_size") and chunked != [bool(each) for each in hf_config["no_rope_layers"]]:
        raise UsageError("layer_types and no_rope_layers differ: layers with rotary embedding have chunked attention")


LLAMA4 = ModelFamily(
    architectures=("Llama4ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        GatedMLPMapping(
            f"{_MLP}.linear_fc1.weight", gate=f"{_HF_MLP}.gate_proj.weight", up=f"{_HF_MLP}.up_proj.weight"
        ),
        RowParallelMapping(f"{_MLP}.linear_fc2.weight", f"{_HF_MLP}.down_proj.weight"),
        ReplicatedMapping(f"{_MLP}.router.weight", f"{_HF_MLP}.router.weight"),
        *decoder.routed_experts("feed_forward.experts"),
        *decoder.shared_experts("feed_forward.shared_expert"),
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        "ffn_hidden_size": "intermediate_size_mlp",
        "num_moe_experts": "num_local_experts",
        "moe_layer_freq": Translation(_moe_layers, _sparse_layers),
        "moe_ffn_hidden_size": "intermediate_size",
        "moe_shared_expert_intermediate_size": Translation(lambda hf_config: look_up(hf_config, "intermediate_size")),
        "moe_router_topk": "num_experts_per_tok",
        "qk_l2_norm": "use_qk_norm",
    },
    requires=decoder.NO_BIASES,
    computes={**decoder.PLAIN_DECODER, "num_experts_per_tok": 1},
    check=_check,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={
        **decoder.GATED_RMSNORM_DECODER,
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
        "rotary_interleaved": True,
    },
    layers={
        "no_rope_freq": decoder.layers_without_rope("no_rope_layers", marked=0),
        "attention_chunk_size": "attention_chunk_size",
        "attn_temperature_tuning": "attn_temperature_tuning",
        "floor_scale": "floor_scale",
        "attn_scale": "attn_scale",
    },
    packed_experts=PackedExperts(transposed=True),
)

LLAMA4_VISION = replace(
    LLAMA4,
    architectures=("Llama4ForConditionalGeneration",),
    mappings=tuple(
        mapping.rename(mapping.megatron_param, lambda name: f"language_model.{name}") for mapping in LLAMA4.mappings
    ),
    language_part="text_config",
    carried=("vision_model.", "multi_modal_projector."),
)
