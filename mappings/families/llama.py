"""Llama 2 and 3, Mistral and Ministral 3: grouped-query attention, gated MLP, no biases. Mistral 0.1 has a window."""

from dataclasses import replace
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, Translation, look_up
from amaxbridge.mappings.megatron_settings import Settings

LLAMA = ModelFamily(
    architectures=("LlamaForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *decoder.MLP,
        *decoder.HEAD,
    ),
    transformer=decoder.DECODER_SIZES,
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants=decoder.GATED_RMSNORM_DECODER,
)

MISTRAL = replace(
    LLAMA,
    architectures=("MistralForCausalLM",),
    transformer={**decoder.DECODER_SIZES, "window_size": decoder.WINDOW},
)


def _check_scale(hf_config: HFConfig) -> None:
    """Raises UsageError if queries are scaled by their position, which Megatron lacks."""
    if beta := look_up(hf_config, "rope_parameters").get("llama_4_scaling_beta"):
        raise UsageError(
            f"llama_4_scaling_beta={beta} scales queries by their position, which Megatron's layers do not"
        )


def _no_scale(settings: Settings) -> dict[str, Any]:
    """The fields without which transformers and vLLM do not compute this scale of one."""
    places = {} if settings["rope_scaling"] else {"original_max_position_embeddings": settings["max_sequence_length"]}
    return {f"rope_parameters.{name}": value for name, value in {"llama_4_scaling_beta": 0.0, **places}.items()}


MINISTRAL3 = replace(
    MISTRAL,
    architectures=("Ministral3ForCausalLM",),
    check=_check_scale,
    computed=Translation(lambda hf_config: {}, _no_scale),
)
