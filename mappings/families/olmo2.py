"""OLMo 2 and 3: Exaone 4 with query and key norms over all heads of a token together. OLMo 3 has windows."""

from dataclasses import replace
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.exaone4 import EXAONE4
from amaxbridge.mappings.family import HFConfig, Translation, look_up
from amaxbridge.mappings.megatron_settings import Settings

OLMO2 = replace(EXAONE4, architectures=("Olmo2ForCausalLM",), layers=decoder.WITH_NORMS_AFTER, norm_over_all_heads=True)


def _check(hf_config: HFConfig) -> None:
    """Raises UsageError if layers of one kind scale their rotary embedding, which Megatron has for all layers alike."""
    full, sliding = (look_up(hf_config, f"rope_parameters.{kind}_attention") for kind in ("full", "sliding"))
    if full != sliding or full.get("rope_type") != "default":
        raise UsageError(
            f"Megatron's rotary embedding is the same in all layers, and not scaled; found {full} and {sliding}"
        )


def _rope(settings: Settings) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": settings["rotary_base"]}
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}


OLMO3 = replace(
    OLMO2,
    architectures=("Olmo3ForCausalLM",),
    check=_check,
    model={
        **decoder.MODEL_ARGUMENTS,
        "rotary_base": Translation(
            lambda hf_config: look_up(hf_config, "rope_parameters.full_attention.rope_theta"), _rope
        ),
    },
    layers={**decoder.WITH_NORMS_AFTER, **decoder.SLIDING_LAYERS},
)
