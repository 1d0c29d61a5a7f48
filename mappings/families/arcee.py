"""Arcee (AFM): Llama with an MLP that has no gate, and squared ReLU."""

from dataclasses import replace

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.llama import LLAMA
from amaxbridge.mappings.weights import ColumnParallelMapping

ARCEE = replace(
    LLAMA,
    architectures=("ArceeForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        ColumnParallelMapping(f"{decoder.MEGATRON}.mlp.linear_fc1.weight", f"{decoder.HF}.mlp.up_proj.weight"),
        decoder.DOWN,
        *decoder.HEAD,
    ),
    computes={**decoder.PLAIN_DECODER, "hidden_act": "relu2"},
    constants={**decoder.GATED_RMSNORM_DECODER, "gated_linear_unit": False},
    activation="relu2",
)
