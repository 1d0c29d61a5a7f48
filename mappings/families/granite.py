"""Granite, dense: a Llama that multiplies embeddings, scores, what each layer adds, and logits by constants."""

from dataclasses import replace

from amaxbridge.mappings.families.llama import LLAMA
from amaxbridge.mappings.family import Source, Translation, look_up


def _factor(field: str) -> Translation:
    """A factor, None for one."""
    return Translation(
        lambda hf_config: None if look_up(hf_config, field) == 1 else look_up(hf_config, field),
        lambda settings: {field: settings[field] or 1.0},
    )


MULTIPLIERS: dict[str, Source] = {
    "softmax_scale": Translation(
        lambda hf_config: look_up(hf_config, "attention_multiplier"),
        lambda settings: {"attention_multiplier": settings["softmax_scale"] or settings["kv_channels"] ** -0.5},
    ),
    **{field: _factor(field) for field in ("embedding_multiplier", "residual_multiplier", "logits_scaling")},
}
"""Megatron lacks all but the scale of scores; `bridge/megatron/multipliers.py` applies the others."""

GRANITE = replace(LLAMA, architectures=("GraniteForCausalLM",), layers=MULTIPLIERS)
