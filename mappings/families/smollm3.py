"""SmolLM3: a Llama in which every fourth layer, or those that config.json lists, has no rotary embedding."""

from dataclasses import replace

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    architectures=("SmolLM3ForCausalLM",),
    layers={"no_rope_freq": decoder.layers_without_rope("no_rope_layers", marked=0)},
)
