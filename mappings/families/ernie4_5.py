"""ERNIE-4.5, dense: a Llama whose rotary embedding turns neighbouring columns together."""

from dataclasses import replace

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.llama import LLAMA

ERNIE4_5 = replace(
    LLAMA,
    architectures=("Ernie4_5ForCausalLM",),
    requires={"use_bias": False},
    constants={**decoder.GATED_RMSNORM_DECODER, "rotary_interleaved": True},
)
