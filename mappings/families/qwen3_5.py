"""Qwen3.5 and 3.6, dense and with experts: Qwen3-Next's layers, with other projections into the gated delta nets.

Every layer of the models with experts has them, and a router that always divides by the sum of the chosen weights.
"""

from amaxbridge.mappings.families import decoder, qwen3_next
from amaxbridge.mappings.families.qwen3_moe import SPARSE_LAYERS
from amaxbridge.mappings.family import ModelFamily, Source, Translation, fixed, look_up
from amaxbridge.mappings.gated_delta_net import DeltaProjectionMapping
from amaxbridge.mappings.mapping import MegatronParamMapping

_DELTA, _HF_DELTA = f"{decoder.MEGATRON}.self_attention", f"{decoder.HF}.linear_attn"

_ATTENTION: tuple[MegatronParamMapping, ...] = (
    *qwen3_next.ATTENTION_LAYER,
    DeltaProjectionMapping(
        f"{_DELTA}.in_proj.weight",
        qkv=f"{_HF_DELTA}.in_proj_qkv.weight",
        z=f"{_HF_DELTA}.in_proj_z.weight",
        b=f"{_HF_DELTA}.in_proj_b.weight",
        a=f"{_HF_DELTA}.in_proj_a.weight",
    ),
    *qwen3_next.DELTA_NET,
)

_SIZES: dict[str, Source] = {
    **decoder.DECODER_SIZES,
    **qwen3_next.DELTA_SIZES,
    "mtp_num_layers": qwen3_next.mtp_count("mtp_num_hidden_layers"),
}
_REQUIRES = {**decoder.NO_BIASES, "attn_output_gate": True, "mtp_use_dedicated_embeddings": False}

QWEN3_5 = ModelFamily(
    architectures=("Qwen3_5ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *_ATTENTION,
        *decoder.MLP,
        *decoder.HEAD,
        *qwen3_next.mtp_layer(*qwen3_next.ATTENTION_LAYER, *decoder.MLP),
    ),
    transformer=_SIZES,
    requires=_REQUIRES,
    computes=decoder.PLAIN_DECODER,
    model=qwen3_next.MODEL_ARGUMENTS,
    constants=qwen3_next.CONSTANTS,
)

QWEN3_5_MOE = ModelFamily(
    architectures=("Qwen3_5MoeForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        *_ATTENTION,
        *qwen3_next.EXPERTS,
        *decoder.HEAD,
        *qwen3_next.mtp_layer(*qwen3_next.ATTENTION_LAYER, *qwen3_next.EXPERTS),
    ),
    transformer={
        **_SIZES,
        **SPARSE_LAYERS,
        "ffn_hidden_size": Translation(lambda hf_config: look_up(hf_config, "moe_intermediate_size")),  # of no layer
        "moe_layer_freq": Translation(lambda hf_config: [1] * look_up(hf_config, "num_hidden_layers")),
        "moe_router_pre_softmax": fixed(False),
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    },
    requires={**_REQUIRES, "mlp_only_layers": []},
    computes=decoder.PLAIN_DECODER,
    model=qwen3_next.MODEL_ARGUMENTS,
    constants=qwen3_next.QWEN3_NEXT.constants,
)
