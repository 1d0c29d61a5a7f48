"""Granite 4: Mamba-2 or attention, and after either an MLP, or experts with a shared one; Granite's multipliers.

In Megatron a HybridModel, whose layers pair up into those of the files. Its attention has no rotary embedding, or one.
HybridModel lacks the multipliers, so such a model is exported, and not built.
"""

from collections.abc import Iterator
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.granite import EXPERTS, MULTIPLIERS, PACKED_EXPERTS
from amaxbridge.mappings.families.nemotron_h import mamba_mixer
from amaxbridge.mappings.family import HFConfig, ModelFamily, Source, Translation, look_up, read_table
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.weights import PackedGatedMLPMapping, RowParallelMapping

_LETTERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*"}
_SPARSE: dict[str, Source] = {
    "num_moe_experts": "num_local_experts",
    "moe_ffn_hidden_size": "intermediate_size",
    "moe_shared_expert_intermediate_size": "shared_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
}


def _is_sparse(hf_config: HFConfig) -> bool:
    return bool(look_up(hf_config, "num_local_experts"))


def _pattern(hf_config: HFConfig) -> str:
    kinds = look_up(hf_config, "layer_types")
    if unknown := set(kinds) - _LETTERS.keys():
        raise UsageError(f"layer_types has {', '.join(sorted(unknown))}; known: {', '.join(_LETTERS)}")
    return "".join(_LETTERS[kind] + ("E" if _is_sparse(hf_config) else "-") for kind in kinds)


def _experts(hf_config: HFConfig) -> dict[str, Any]:
    """The settings of router and experts, if the model has experts."""
    if not _is_sparse(hf_config):
        return {}
    return {**read_table(_SPARSE, hf_config), **decoder.SOFTMAX_ROUTER, "moe_router_pre_softmax": False}


def _mlp(hf_config: HFConfig) -> Iterator[MegatronParamMapping]:
    """The MLP of every layer: beside routed experts Megatron calls it their shared expert."""
    mlp = f"{decoder.MEGATRON}.mlp.shared_experts" if _is_sparse(hf_config) else f"{decoder.MEGATRON}.mlp"
    yield PackedGatedMLPMapping(f"{mlp}.linear_fc1.weight", f"{decoder.HF}.shared_mlp.input_linear.weight")
    yield RowParallelMapping(f"{mlp}.linear_fc2.weight", f"{decoder.HF}.shared_mlp.output_linear.weight")


def _check(hf_config: HFConfig) -> None:
    raise UsageError("Megatron's HybridModel lacks Granite's multipliers: the model can be exported, not built")


GRANITE_HYBRID = ModelFamily(
    architectures=("GraniteMoeHybridForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        *mamba_mixer(f"{decoder.MEGATRON}.mixer", f"{decoder.HF}.mamba"),
        decoder.MLP_NORM,
        *EXPERTS,
        *decoder.HEAD,
    ),
    exceptions=_mlp,
    hybrid_pattern=Translation(_pattern),
    paired=True,
    transformer={
        **decoder.DECODER_SIZES,
        "ffn_hidden_size": "shared_intermediate_size",
        "mamba_num_heads": "mamba_n_heads",
        "mamba_head_dim": "mamba_d_head",
        "mamba_num_groups": "mamba_n_groups",
        "mamba_state_dim": "mamba_d_state",
    },
    derived=Translation(_experts),
    requires={"attention_bias": False, "mamba_proj_bias": False, "mamba_conv_bias": True},
    computes={"hidden_act": "silu", "mamba_d_conv": 4},
    check=_check,
    model={
        **{name: source for name, source in decoder.MODEL_ARGUMENTS.items() if name != "position_embedding_type"},
        "position_embedding_type": Translation(
            lambda hf_config: "rope" if hf_config.get("position_embedding_type") == "rope" else "none"
        ),
    },
    constants=decoder.GATED_RMSNORM_DECODER,
    layers=MULTIPLIERS,
    packed_experts=PACKED_EXPERTS,
)
