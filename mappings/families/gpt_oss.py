"""GPT-OSS: every layer has experts, everything has biases, and every head has an attention sink.

A sink is a logit in the softmax that belongs to no key: Megatron's learnable softmax offset. Experts
compute `(up + 1) · gate · sigmoid(1.702 · gate)` of clamped gate and up.

Plain files hold the experts of a layer as one tensor, inputs first, gate and up interleaved. The published files hold
them in MXFP4 (`…_blocks`, `…_scales`), which is read but never written.
"""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, PackedExperts, fixed, look_up, require
from amaxbridge.mappings.weights import ColumnParallelMapping, GatedMLPMapping, ReplicatedMapping

_ATTENTION, _HF_ATTENTION = f"{decoder.MEGATRON}.self_attention", f"{decoder.HF}.self_attn"
_MLP, _HF_MLP = f"{decoder.MEGATRON}.mlp", f"{decoder.HF}.mlp"


def _check(hf_config: HFConfig) -> None:
    """Raises UsageError for a rotary embedding that Megatron lacks."""
    rope = {"rope_type": "yarn", "attention_factor": None, "mscale": None, "mscale_all_dim": None}
    require({**hf_config, **look_up(hf_config, "rope_parameters")}, rope, "has no equal in Megatron's layers")


GPT_OSS = ModelFamily(
    architectures=("GptOssForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *decoder.QKV,
        decoder.QKV_BIAS,
        ColumnParallelMapping(f"{_ATTENTION}.core_attention.softmax_offset", f"{_HF_ATTENTION}.sinks"),
        decoder.ATTENTION_OUTPUT,
        ReplicatedMapping(f"{_ATTENTION}.linear_proj.bias", f"{_HF_ATTENTION}.o_proj.bias"),
        decoder.MLP_NORM,
        ReplicatedMapping(f"{_MLP}.router.weight", f"{_HF_MLP}.router.weight"),
        ReplicatedMapping(f"{_MLP}.router.bias", f"{_HF_MLP}.router.bias"),
        *decoder.ROUTED_EXPERTS,
        GatedMLPMapping(
            f"{_MLP}.experts.linear_fc1.bias*",
            gate=f"{_HF_MLP}.experts.*.gate_proj.bias",
            up=f"{_HF_MLP}.experts.*.up_proj.bias",
        ),
        ReplicatedMapping(f"{_MLP}.experts.linear_fc2.bias*", f"{_HF_MLP}.experts.*.down_proj.bias"),
        *decoder.HEAD,
    ),
    transformer={
        **decoder.DECODER_SIZES,
        **decoder.ONLY_EXPERTS,
        "num_moe_experts": "num_local_experts",
    },
    requires={"attention_bias": True},
    computes={"swiglu_alpha": 1.702},
    check=_check,
    model={
        **decoder.MODEL_ARGUMENTS,
        "position_embedding_type": fixed("yarn", **{"rope_parameters.rope_type": "yarn"}),
    },
    constants={
        **decoder.GATED_RMSNORM_DECODER,
        **decoder.SOFTMAX_ROUTER,
        "add_bias_linear": True,
        "moe_router_pre_softmax": False,
    },
    layers={
        "softmax_type": fixed("learnable"),
        **decoder.SLIDING_LAYERS,
        "activation_func_clamp_value": "swiglu_limit",
        "glu_linear_offset": fixed(1.0),
        "yarn_rotary_scaling_factor": "rope_parameters.factor",
        "yarn_original_max_position_embeddings": "rope_parameters.original_max_position_embeddings",
        "yarn_beta_fast": "rope_parameters.beta_fast",
        "yarn_beta_slow": "rope_parameters.beta_slow",
        "yarn_correction_range_round_to_int": "rope_parameters.truncate",
        "yarn_mscale": fixed(1.0),
        "yarn_mscale_all_dim": fixed(0.0),
    },
    activation="quick_gelu",
    packed_experts=PackedExperts(transposed=True, interleaved=True),
)
