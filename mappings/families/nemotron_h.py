"""Nemotron-H: Mamba-2, attention, MLP or experts, one to a layer; Megatron has it as a HybridModel only.

Attention without a rotary embedding, squared ReLU without a gate, and experts that may work on a smaller latent vector
(Nemotron 3 Super). The names are those of the published files, which transformers renames when it loads them. MTP
layers lie outside `backbone`, numbered consecutively; transformers does not build them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import sigmoid_experts
from amaxbridge.mappings.family import (
    HFConfig,
    ModelFamily,
    Source,
    Translation,
    fixed,
    look_up,
    read_table,
    write_table,
)
from amaxbridge.mappings.hybrid_layers import read_pattern
from amaxbridge.mappings.mamba_mixer import MambaConvolutionMapping, MambaProjectionMapping
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import (
    ColumnParallelMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
    VocabParallelMapping,
)

_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_LETTERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}


def _layers(megatron: str, hf: str) -> Iterator[MegatronParamMapping]:
    """The mappings of every kind of layer."""
    attention, mlp, mixer = f"{megatron}.self_attention", f"{megatron}.mlp", f"{hf}.mixer"
    yield ReplicatedMapping(f"{megatron}.norm.weight", f"{hf}.norm.weight")
    yield QKVMapping(
        f"{attention}.linear_qkv.weight",
        q=f"{mixer}.q_proj.weight",
        k=f"{mixer}.k_proj.weight",
        v=f"{mixer}.v_proj.weight",
    )
    yield RowParallelMapping(f"{attention}.linear_proj.weight", f"{mixer}.o_proj.weight")
    yield ColumnParallelMapping(f"{mlp}.linear_fc1.weight", f"{mixer}.up_proj.weight")
    yield RowParallelMapping(f"{mlp}.linear_fc2.weight", f"{mixer}.down_proj.weight")
    yield ReplicatedMapping(f"{mlp}.router.weight", f"{mixer}.gate.weight")
    yield ReplicatedMapping(f"{mlp}.router.expert_bias", f"{mixer}.gate.e_score_correction_bias")
    for latent in ("fc1_latent_proj", "fc2_latent_proj"):
        yield ReplicatedMapping(f"{mlp}.{latent}.weight", f"{mixer}.{latent}.weight")
    shared, hf_shared = f"{mlp}.shared_experts", f"{mixer}.shared_experts"
    yield ColumnParallelMapping(f"{shared}.linear_fc1.weight", f"{hf_shared}.up_proj.weight")
    yield RowParallelMapping(f"{shared}.linear_fc2.weight", f"{hf_shared}.down_proj.weight")
    yield ColumnParallelMapping(f"{mlp}.experts.linear_fc1.weight*", f"{mixer}.experts.*.up_proj.weight")
    yield RowParallelMapping(f"{mlp}.experts.linear_fc2.weight*", f"{mixer}.experts.*.down_proj.weight")


def mamba_mixer(megatron: str, hf: str) -> Iterator[MegatronParamMapping]:
    """The mixer of a Mamba layer."""
    yield MambaProjectionMapping(f"{megatron}.in_proj.weight", f"{hf}.in_proj.weight")
    yield MambaConvolutionMapping(f"{megatron}.conv1d.weight", f"{hf}.conv1d.weight")
    yield MambaConvolutionMapping(f"{megatron}.conv1d.bias", f"{hf}.conv1d.bias")
    for name in ("A_log", "D", "dt_bias", "norm.weight"):
        yield ColumnParallelMapping(f"{megatron}.{name}", f"{hf}.{name}")
    yield RowParallelMapping(f"{megatron}.out_proj.weight", f"{hf}.out_proj.weight")


def _letters(kinds: Iterable[str]) -> str:
    kinds = list(kinds)
    if unknown := set(kinds) - _LETTERS.keys():
        raise UsageError(f"layers of the kind {', '.join(sorted(unknown))} are not known; known: {', '.join(_LETTERS)}")
    return "".join(_LETTERS[kind] for kind in kinds)


def _pattern(hf_config: HFConfig) -> str:
    decoder = _letters(look_up(hf_config, "layers_block_type"))
    mtp = _letters(hf_config.get("mtp_layers_block_type") or ())
    return "/".join([decoder, *[mtp] * (sigmoid_experts.MTP_COUNT.read(hf_config) or 0)])


def _layer_kinds(settings: Settings) -> dict[str, Any]:
    """The layers as transformers reads them, and under older names that other programs still read."""
    decoder, mtp, count = read_pattern(settings["hybrid_layer_pattern"])
    more = {"mtp_layers_block_type": [_KINDS[letter] for letter in mtp]} if count else {}
    return {
        "layers_block_type": [_KINDS[letter] for letter in decoder],
        "hybrid_override_pattern": decoder,
        "num_hidden_layers": len(decoder),
        "num_nextn_predict_layers": count,
        "time_step_min": 1e-30,  # lower bound of steps in transformers; Megatron has none
        **more,
    }


_EXPERTS: dict[str, Source] = {
    "num_moe_experts": "n_routed_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_latent_size": "moe_latent_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_num_groups": sigmoid_experts.groups("moe_router_num_groups", "n_group"),
    "moe_router_group_topk": sigmoid_experts.groups("moe_router_group_topk", "topk_group"),
    "moe_router_topk_scaling_factor": sigmoid_experts.SCALING_FACTOR,
}


def _experts(hf_config: HFConfig) -> dict[str, Any]:
    """The settings of router and experts, if the model has experts."""
    return {**read_table(_EXPERTS, hf_config), **sigmoid_experts.ROUTER} if "E" in _pattern(hf_config) else {}


def _expert_fields(settings: Settings) -> dict[str, Any]:
    return write_table(_EXPERTS, settings) if "E" in settings["hybrid_layer_pattern"] else {}


NEMOTRON_H = ModelFamily(
    architectures=("NemotronHForCausalLM",),
    mappings=(
        VocabParallelMapping("embedding.word_embeddings.weight", "backbone.embeddings.weight"),
        *_layers("decoder.layers.*", "backbone.layers.*"),
        *mamba_mixer("decoder.layers.*.mixer", "backbone.layers.*.mixer"),
        ReplicatedMapping("decoder.final_layernorm.weight", "backbone.norm_f.weight"),
        VocabParallelMapping("output_layer.weight", "lm_head.weight"),
        *_layers("mtp.layers.*", "mtp.layers.*"),
        ReplicatedMapping("mtp.layers.*.enorm.weight", "mtp.layers.*.enorm.weight"),
        ReplicatedMapping("mtp.layers.*.hnorm.weight", "mtp.layers.*.hnorm.weight"),
        ColumnParallelMapping("mtp.layers.*.eh_proj.weight", "mtp.layers.*.eh_proj.weight"),
        ReplicatedMapping("mtp.layers.*.final_layernorm.weight", "mtp.layers.*.final_layernorm.weight"),
    ),
    hybrid_pattern=Translation(_pattern, _layer_kinds),
    transformer={
        "num_layers": Translation(lambda hf_config: len(look_up(hf_config, "layers_block_type"))),
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "layernorm_epsilon": "layer_norm_epsilon",
        "mamba_num_heads": "mamba_num_heads",
        "mamba_head_dim": "mamba_head_dim",
        "mamba_num_groups": "n_groups",
        "mamba_state_dim": "ssm_state_size",
        "mtp_num_layers": sigmoid_experts.MTP_COUNT,
    },
    derived=Translation(_experts, _expert_fields),
    requires={"use_bias": False, "mamba_proj_bias": False, "attention_bias": False, "mlp_bias": False},
    computes={
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "conv_kernel": 4,
        "use_conv_bias": True,
        "norm_topk_prob": True,
    },
    activation="relu2",
    model={
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "share_embeddings_and_output_weights": "tie_word_embeddings",
        "position_embedding_type": fixed("none"),
    },
    constants={"normalization": "RMSNorm", "gated_linear_unit": False, "add_bias_linear": False},
    kept_in_fp32=sigmoid_experts.KEPT_IN_FP32,
)
