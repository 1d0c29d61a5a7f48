"""The mixture of experts of DeepSeek-V3, which GLM-4.5 has too: dense layers first, then routed and shared experts.

The router takes the top k of sigmoid scores plus a bias for each expert, within the best groups of experts. Megatron
ranks a group by its best `top k / chosen groups` experts, transformers by its best two: the same if that number is
two, as in every released model; `check_router` refuses to build any other.

Megatron numbers the layers for multi-token prediction (MTP) from 0, Hugging Face from `num_hidden_layers` on, a shift
that wildcards cannot express. So these mappings are made for one configuration, from the decoder layer's own, and are
exceptions in the registry: `model.layers.*.…` would also match `model.layers.61.…`. In Hugging Face's files an MTP
layer has copies of the embedding and the output layer; Megatron shares these with the decoder.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, Source, Translation, fixed, look_up
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import (
    ColumnParallelMapping,
    CopiedVocabMapping,
    ReplicatedMapping,
)

_MLP, _HF_MLP = f"{decoder.MEGATRON}.mlp", f"{decoder.HF}.mlp"

SHARED_EXPERTS = decoder.shared_experts("mlp.shared_experts")
EXPERTS: tuple[MegatronParamMapping, ...] = (
    decoder.ROUTER,
    ReplicatedMapping(f"{_MLP}.router.expert_bias", f"{_HF_MLP}.gate.e_score_correction_bias"),
    *SHARED_EXPERTS,
    *decoder.ROUTED_EXPERTS,
)


def mtp_layers(hf_config: HFConfig, decoder_layer: Sequence[MegatronParamMapping]) -> Iterator[MegatronParamMapping]:
    """The mappings of all MTP layers of a model, and of the two tensors that these share with the decoder."""
    first, count = look_up(hf_config, "num_hidden_layers"), MTP_COUNT.read(hf_config) or 0
    hf_layers = [f"model.layers.{first + index}" for index in range(count)]
    for index, hf_layer in enumerate(hf_layers):
        layer = f"mtp.layers.{index}"
        for mapping in decoder_layer:
            yield _moved(mapping, f"{layer}.mtp_model_layer", hf_layer)
        yield ReplicatedMapping(f"{layer}.enorm.weight", f"{hf_layer}.enorm.weight")
        yield ReplicatedMapping(f"{layer}.hnorm.weight", f"{hf_layer}.hnorm.weight")
        yield ColumnParallelMapping(f"{layer}.eh_proj.weight", f"{hf_layer}.eh_proj.weight")
        yield ReplicatedMapping(f"{layer}.final_layernorm.weight", f"{hf_layer}.shared_head.norm.weight")
    if hf_layers:
        for shared, copy in ((decoder.EMBEDDING, "embed_tokens"), (decoder.OUTPUT, "shared_head.head")):
            copies = [f"{layer}.{copy}.weight" for layer in hf_layers]
            yield CopiedVocabMapping(shared.megatron_param, shared.hf_param, copies=copies)


def _moved(mapping: MegatronParamMapping, layer: str, hf_layer: str) -> MegatronParamMapping:
    """A decoder layer's mapping, moved to another layer."""
    megatron_param = mapping.megatron_param.replace(decoder.MEGATRON, layer)
    return mapping.rename(megatron_param, lambda name: name.replace(decoder.HF, hf_layer))


MTP_COUNT = Translation(
    lambda hf_config: hf_config.get("num_nextn_predict_layers") or None,  # Megatron has None in place of 0
    lambda settings: {"num_nextn_predict_layers": settings["mtp_num_layers"] or 0},
)


def _moe_layers(hf_config: HFConfig) -> list[int]:
    """0 for each dense layer at the start, then 1."""
    dense = look_up(hf_config, "first_k_dense_replace")
    return [int(layer >= dense) for layer in range(look_up(hf_config, "num_hidden_layers"))]


def _listed_layers(hf_config: HFConfig) -> list[int]:
    """1 for each layer with experts, 0 for each dense one.

    Raises:
        UsageError: `first_k_dense_replace`, which engines read, says otherwise than the list, which transformers reads.
    """
    listed = [int(kind == "sparse") for kind in look_up(hf_config, "mlp_layer_types")]
    told = hf_config.get("first_k_dense_replace")
    if told is not None and listed != [int(layer >= told) for layer in range(len(listed))]:
        raise UsageError(
            f"first_k_dense_replace={told}, and mlp_layer_types lists others as dense: engines read the one, "
            "transformers the other"
        )
    return listed


def _layer_types(settings: Settings) -> dict[str, Any]:
    sparse = settings["moe_layer_freq"]
    first = [*sparse, 1].index(1)
    fields: dict[str, Any] = {"mlp_layer_types": ["sparse" if each else "dense" for each in sparse]}
    return fields | ({"first_k_dense_replace": first} if all(sparse[first:]) else {})


LISTED_LAYERS = Translation(_listed_layers, _layer_types)
"""Megatron's `moe_layer_freq` for architectures that list the kind of each layer."""


def groups(setting: str, field: str) -> Translation:
    """A setting of group-limited routing, None if all experts are one group."""
    return Translation(
        lambda hf_config: look_up(hf_config, field) if (hf_config.get("n_group") or 1) > 1 else None,
        lambda settings: {field: settings[setting] or 1},
    )


SCALING_FACTOR = Translation(
    lambda hf_config: look_up(hf_config, "routed_scaling_factor"),
    lambda settings: {"routed_scaling_factor": settings["moe_router_topk_scaling_factor"] or 1.0},
)

SIZES: dict[str, Source] = {
    "num_moe_experts": "n_routed_experts",
    "moe_layer_freq": Translation(
        _moe_layers, lambda settings: {"first_k_dense_replace": [*settings["moe_layer_freq"], 1].index(1)}
    ),
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": decoder.shared_width("n_shared_experts"),
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_num_groups": groups("moe_router_num_groups", "n_group"),
    "moe_router_group_topk": groups("moe_router_group_topk", "topk_group"),
    "moe_router_topk_scaling_factor": SCALING_FACTOR,
    "mtp_num_layers": MTP_COUNT,
}

ROUTER = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
SPELLED_ROUTER: dict[str, Source] = {
    "moe_router_score_function": fixed("sigmoid", scoring_func="sigmoid", topk_method="noaux_tc")
}
"""For architectures whose router vLLM and SGLang choose by these fields: without them they would take a softmax."""

COMPUTES = {"hidden_act": "silu", "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""What Megatron's layers compute. transformers has no field for the last two; published files do."""


def check_router(hf_config: HFConfig) -> None:
    """Raises UsageError if Megatron routes tokens otherwise than transformers and the engines."""
    if look_up(hf_config, "num_experts_per_tok") == 1:
        raise UsageError("Megatron does not normalize the score of a single expert, num_experts_per_tok=1")
    check_groups(hf_config, ranked_by=2)


def check_groups(hf_config: HFConfig, *, ranked_by: int) -> None:
    """Raises UsageError if Megatron ranks groups of experts otherwise than transformers and the engines.

    Args:
        ranked_by: the number of experts of a group whose scores, added, rank it in transformers, vLLM and SGLang.
    """
    if (hf_config.get("n_group") or 1) == 1:
        return
    taken, chosen = look_up(hf_config, "num_experts_per_tok"), look_up(hf_config, "topk_group") or 0
    best = taken // chosen if chosen else 0
    if best != ranked_by:
        raise UsageError(
            f"Megatron ranks a group of experts by its best {best} (num_experts_per_tok={taken} divided by "
            f"topk_group={chosen}), this model by its best {ranked_by}: it has no equal in Megatron's layers"
        )


KEPT_IN_FP32 = ("e_score_correction_bias",)
"""fp32 as published; transformers lists it in `_keep_in_fp32_modules_strict`."""
