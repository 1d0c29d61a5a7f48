"""Granite, a Llama or Mixtral that multiplies embeddings, scores, what each layer adds, and logits by constants."""

from dataclasses import replace

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.llama import LLAMA
from amaxbridge.mappings.families.mixtral import MIXTRAL
from amaxbridge.mappings.family import PackedExperts, Source, Translation, look_up
from amaxbridge.mappings.weights import ReplicatedMapping


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

EXPERTS = (
    ReplicatedMapping(f"{decoder.MEGATRON}.mlp.router.weight", f"{decoder.HF}.block_sparse_moe.router.layer.weight"),
    *decoder.routed_experts("block_sparse_moe.experts"),
)
PACKED_EXPERTS = PackedExperts(names=("input_linear.weight", "output_linear.weight"))

GRANITE_MOE = replace(
    MIXTRAL,
    architectures=("GraniteMoeForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        *EXPERTS,
        *decoder.HEAD,
    ),
    transformer={name: source for name, source in MIXTRAL.transformer.items() if name != "window_size"},
    layers=MULTIPLIERS,
    packed_experts=PACKED_EXPERTS,
)
