"""DeepSeek-V3: multi-head latent attention, dense layers first, then routed and shared experts, then MTP layers.

The router takes the top k of sigmoid scores plus a bias for each expert, within the best groups of experts. Megatron
ranks a group by its best `top k / chosen groups` experts, transformers by its best two: the same where that is two,
as in every released model.

Megatron numbers the layers for multi-token prediction (MTP) from 0, Hugging Face from `num_hidden_layers` on, a shift
that wildcards cannot say. So these mappings are made for a configuration, from the decoder layer's own, and are
exceptions in the registry: `model.layers.61.…` is also a name that `model.layers.*.…` would take. An MTP layer
brings copies of the embedding and of the output layer in Hugging Face's files, which Megatron shares with the decoder.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mappings.errors import UsageError
from mappings.families import parts
from mappings.family import ModelFamily, look_up
from mappings.mapping import MegatronParamMapping
from mappings.weights import (
    ColumnParallelMapping,
    CopiedVocabMapping,
    GatedMLPMapping,
    LatentDownMapping,
    ReplicatedMapping,
    RowParallelMapping,
)

_ATTENTION, _HF_ATTENTION = f"{parts.MEGATRON}.self_attention", f"{parts.HF}.self_attn"
_MLP, _HF_MLP = f"{parts.MEGATRON}.mlp", f"{parts.HF}.mlp"
_Q_ROWS = ("q_lora_rank",)
_KV_ROWS = ("kv_lora_rank", "qk_pos_emb_head_dim")

_LAYER: tuple[MegatronParamMapping, ...] = (
    ReplicatedMapping(f"{parts.MEGATRON}.input_layernorm.weight", f"{parts.HF}.input_layernorm.weight"),
    ColumnParallelMapping(f"{_ATTENTION}.linear_q_proj.weight", f"{_HF_ATTENTION}.q_proj.weight"),
    LatentDownMapping(f"{_ATTENTION}.linear_q_down_proj.weight", f"{_HF_ATTENTION}.q_a_proj.weight", rows=_Q_ROWS),
    ReplicatedMapping(f"{_ATTENTION}.q_layernorm.weight", f"{_HF_ATTENTION}.q_a_layernorm.weight"),
    ColumnParallelMapping(f"{_ATTENTION}.linear_q_up_proj.weight", f"{_HF_ATTENTION}.q_b_proj.weight"),
    LatentDownMapping(
        f"{_ATTENTION}.linear_kv_down_proj.weight", f"{_HF_ATTENTION}.kv_a_proj_with_mqa.weight", rows=_KV_ROWS
    ),
    ReplicatedMapping(f"{_ATTENTION}.kv_layernorm.weight", f"{_HF_ATTENTION}.kv_a_layernorm.weight"),
    ColumnParallelMapping(f"{_ATTENTION}.linear_kv_up_proj.weight", f"{_HF_ATTENTION}.kv_b_proj.weight"),
    parts.ATTENTION_OUTPUT,
    parts.MLP_NORM,
    *parts.MLP,
    parts.ROUTER,
    ReplicatedMapping(f"{_MLP}.router.expert_bias", f"{_HF_MLP}.gate.e_score_correction_bias"),
    GatedMLPMapping(
        f"{_MLP}.shared_experts.linear_fc1.weight",
        gate=f"{_HF_MLP}.shared_experts.gate_proj.weight",
        up=f"{_HF_MLP}.shared_experts.up_proj.weight",
    ),
    RowParallelMapping(f"{_MLP}.shared_experts.linear_fc2.weight", f"{_HF_MLP}.shared_experts.down_proj.weight"),
    *parts.ROUTED_EXPERTS,
)


def _mtp_layers(hf_config: Mapping[str, Any]) -> Iterator[MegatronParamMapping]:
    """The mappings of all MTP layers of a model, and of the two tensors that they share with the decoder."""
    first, count = hf_config["num_hidden_layers"], _mtp_count(hf_config) or 0
    hf_layers = [f"model.layers.{first + index}" for index in range(count)]
    for index, hf_layer in enumerate(hf_layers):
        layer = f"mtp.layers.{index}"
        for mapping in _LAYER:
            yield _moved(mapping, f"{layer}.mtp_model_layer", hf_layer)
        yield ReplicatedMapping(f"{layer}.enorm.weight", f"{hf_layer}.enorm.weight")
        yield ReplicatedMapping(f"{layer}.hnorm.weight", f"{hf_layer}.hnorm.weight")
        yield ColumnParallelMapping(f"{layer}.eh_proj.weight", f"{hf_layer}.eh_proj.weight")
        yield ReplicatedMapping(f"{layer}.final_layernorm.weight", f"{hf_layer}.shared_head.norm.weight")
    if hf_layers:
        for shared, copy in ((parts.EMBEDDING, "embed_tokens"), (parts.OUTPUT, "shared_head.head")):
            copies = [f"{layer}.{copy}.weight" for layer in hf_layers]
            yield CopiedVocabMapping(shared.megatron_param, shared.hf_param, copies=copies)


def _moved(mapping: MegatronParamMapping, layer: str, hf_layer: str) -> MegatronParamMapping:
    """A decoder layer's mapping for one layer elsewhere."""
    megatron_param = mapping.megatron_param.replace(parts.MEGATRON, layer)
    return mapping.rename(megatron_param, lambda name: name.replace(parts.HF, hf_layer))


def _mtp_count(hf_config: Mapping[str, Any]) -> int | None:
    """None, as Megatron says it, where there are none."""
    return hf_config.get("num_nextn_predict_layers") or None


def _moe_layers(hf_config: Mapping[str, Any]) -> list[int]:
    """0 for each of the dense layers at the start, then 1."""
    dense = look_up(hf_config, "first_k_dense_replace")
    return [int(layer >= dense) for layer in range(hf_config["num_hidden_layers"])]


def _groups(field: str) -> Any:
    """A field of group-limited routing, None where all experts are one group."""
    return lambda hf_config: hf_config[field] if (hf_config.get("n_group") or 1) > 1 else None


def _rope(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Multi-head latent attention keeps its rotary embedding in the configuration.

    Both sides turn pairs (0, 1), (2, 3), … of the rotary dims and leave them as two halves, so no row moves.

    Raises:
        UsageError: a rotary embedding or a router that Megatron does not have.
    """
    rope = look_up(hf_config, "rope_parameters")
    kind = rope.get("rope_type", "default")
    for field, value, known in (
        ("rope_type", kind, ("default", "yarn")),
        ("rope_interleave", hf_config.get("rope_interleave", True), (True,)),
        ("norm_topk_prob", hf_config.get("norm_topk_prob", True), (True,)),
    ):
        if value not in known:
            raise UsageError(f"Megatron's latent attention and sigmoid router have no {field}={value!r}")
    if kind == "default":
        return {"rope_type": "rope", "rotary_base": rope["rope_theta"], "mscale_all_dim": 0.0}
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    return {
        "rope_type": "yarn",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": scales[0] if all(scales) else 1.0,  # as transformers does: one of them alone says nothing
        "mscale_all_dim": scales[1] or 0.0,
    }


DEEPSEEK_V3 = ModelFamily(
    architectures=("DeepseekV3ForCausalLM",),
    mappings=(parts.EMBEDDING, *_LAYER, *parts.HEAD),
    exceptions=_mtp_layers,
    transformer={
        **{name: field for name, field in parts.DECODER_SIZES.items() if name != "kv_channels"},
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_head_dim": "qk_nope_head_dim",
        "qk_pos_emb_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
        "num_moe_experts": "n_routed_experts",
        "moe_layer_freq": _moe_layers,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": lambda config: (
            config["moe_intermediate_size"] * config["n_shared_experts"]
        ),
        "moe_router_topk": "num_experts_per_tok",
        "moe_router_num_groups": _groups("n_group"),
        "moe_router_group_topk": _groups("topk_group"),
        "moe_router_topk_scaling_factor": "routed_scaling_factor",
        "mtp_num_layers": _mtp_count,
    },
    derived=_rope,
    model=parts.MODEL_ARGUMENTS,
    constants={
        **parts.GATED_RMSNORM_DECODER,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
)
