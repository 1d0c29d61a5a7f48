"""Hunyuan V1, dense and with experts: Qwen3's layers, but queries and keys are rotated first and normalized then.

Each layer of the mixture has routed experts as wide as `intermediate_size`, and a shared one.
"""

from dataclasses import replace
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, Translation, fixed, look_up
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import ReplicatedMapping

_ATTENTION, _HF_ATTENTION = f"{decoder.MEGATRON}.self_attention", f"{decoder.HF}.self_attn"
_MLP, _HF_MLP = f"{decoder.MEGATRON}.mlp", f"{decoder.HF}.mlp"
_LAYER = (
    *decoder.QKV,
    ReplicatedMapping(f"{_ATTENTION}.q_layernorm.weight", f"{_HF_ATTENTION}.query_layernorm.weight"),
    ReplicatedMapping(f"{_ATTENTION}.k_layernorm.weight", f"{_HF_ATTENTION}.key_layernorm.weight"),
    decoder.ATTENTION_OUTPUT,
    decoder.MLP_NORM,
)


def _rotary_base(hf_config: HFConfig) -> float:
    """The base, which a fixed `alpha` stretches: transformers' HunYuanDenseV1RotaryEmbedding.

    Raises:
        UsageError: the rotary embedding is scaled in another way, which Megatron lacks.
    """
    rope = look_up(hf_config, "rope_parameters")
    kind, base, width = rope.get("rope_type", "default"), look_up(rope, "rope_theta"), decoder.head_dim(hf_config)
    if kind == "dynamic" and rope.get("alpha"):
        return float(base * rope["alpha"] ** (width / (width - 2)))
    if kind != "default":
        raise UsageError(f"Megatron's rotary embedding does not scale as this one does: {rope}")
    return float(base)


def _rope(settings: Settings) -> dict[str, Any]:
    return {"rope_parameters.rope_type": "default", "rope_parameters.rope_theta": settings["rotary_base"]}


def _one_number(field: str) -> Translation:
    """A number of a mixture whose config.json may have one for each layer.

    Raises:
        UsageError: layers differ.
    """

    def read(hf_config: HFConfig) -> int:
        value = look_up(hf_config, field)
        if isinstance(value, list) and len(set(value)) != 1:
            raise UsageError(f"layers differ in {field}, which Megatron has for all alike: {value}")
        return int(value[0] if isinstance(value, list) else value)

    return Translation(read, lambda settings: {field: settings[_SETTINGS[field]]})


_SETTINGS = {"num_experts": "num_moe_experts", "moe_topk": "moe_router_topk"}

HUNYUAN_DENSE_V1 = ModelFamily(
    architectures=("HunYuanDenseV1ForCausalLM",),
    mappings=(decoder.EMBEDDING, *_LAYER, *decoder.MLP, *decoder.HEAD),
    transformer=decoder.DECODER_SIZES,
    requires={**decoder.NO_BIASES, "use_qk_norm": True},
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, "rotary_base": Translation(_rotary_base, _rope)},
    constants={**decoder.GATED_RMSNORM_DECODER, "qk_layernorm": True},
    layers={"qk_layernorm_after_rotary": fixed(True)},
    norm_after_rotary=True,
)

HUNYUAN_MOE_V1 = replace(
    HUNYUAN_DENSE_V1,
    architectures=("HunYuanMoEV1ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *_LAYER,
        ReplicatedMapping(f"{_MLP}.router.weight", f"{_HF_MLP}.gate.wg.weight"),
        *decoder.ROUTED_EXPERTS,
        *decoder.shared_experts("mlp.shared_mlp"),
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **decoder.ONLY_EXPERTS,
        "num_moe_experts": _one_number("num_experts"),
        "moe_router_topk": _one_number("moe_topk"),
        "moe_shared_expert_intermediate_size": Translation(lambda hf_config: look_up(hf_config, "intermediate_size")),
    },
    constants={
        **decoder.GATED_RMSNORM_DECODER,
        **decoder.SOFTMAX_ROUTER,
        "moe_router_pre_softmax": False,
        "qk_layernorm": True,
    },
)
