"""DeepSeek-V2 and V2-Lite: latent attention, and experts behind a softmax router, which may keep to the best groups.

A group's rank is that of its best expert. Megatron takes the sum of the best `top k / chosen groups` experts, so it
builds models where that is one, and those without groups (V2-Lite); DeepSeek-V2 itself (6 / 3) can only be exported.
"""

from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder, latent_attention, sigmoid_experts
from amaxbridge.mappings.family import HFConfig, ModelFamily, Translation, look_up
from amaxbridge.mappings.megatron_settings import Settings

_GREEDY, _BY_GROUPS = "greedy", "group_limited_greedy"


def _of_groups(field: str) -> Translation:
    """A setting of group-limited routing, None without groups.

    Raises:
        UsageError: a router of another kind, which has a bias for each expert.
    """

    def read(hf_config: HFConfig) -> Any:
        method = hf_config.get("topk_method", _GREEDY)
        if method not in (_GREEDY, _BY_GROUPS):
            raise UsageError(f"topk_method={method!r} is none of DeepSeek-V2's: {_GREEDY}, {_BY_GROUPS}")
        return look_up(hf_config, field) if method == _BY_GROUPS else None

    def write(settings: Settings) -> dict[str, Any]:
        groups, chosen = settings["moe_router_num_groups"], settings["moe_router_group_topk"]
        return {"topk_method": _BY_GROUPS if groups else _GREEDY, "n_group": groups or 1, "topk_group": chosen or 1}

    return Translation(read, write)


def _check(hf_config: HFConfig) -> None:
    if hf_config.get("topk_method") == _BY_GROUPS:
        sigmoid_experts.check_groups(hf_config, ranked_by=1)


DEEPSEEK_V2 = ModelFamily(
    architectures=("DeepseekV2ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *latent_attention.ATTENTION,
        decoder.MLP_NORM,
        *decoder.MLP,
        decoder.ROUTER,
        *sigmoid_experts.SHARED_EXPERTS,
        *decoder.ROUTED_EXPERTS,
        *decoder.HEAD,
    ),
    transformer={
        **latent_attention.SIZES,
        **{name: field for name, field in sigmoid_experts.SIZES.items() if name != "mtp_num_layers"},
        "moe_router_num_groups": _of_groups("n_group"),
        "moe_router_group_topk": _of_groups("topk_group"),
    },
    requires={"attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1},
    computed=latent_attention.ROPE,
    computes={"hidden_act": "silu", "norm_topk_prob": False, "scoring_func": "softmax"},
    check=_check,
    model=decoder.MODEL_ARGUMENTS,
    constants={
        **latent_attention.CONSTANTS,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
    },
)
