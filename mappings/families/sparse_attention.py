"""DeepSeek-V3.2, GLM-5 and GLM-5.2: DeepSeek-V3 with an indexer in each layer, which picks the keys that a query sees.

Layers of GLM-5.2 share: three in four have no indexer, and see the keys that the one before them picked. Megatron's
`experimental_attention_variant=dsa` takes Transformer Engine's linears only, so no model is built here: names and
shapes are those of transformers.
"""

from dataclasses import replace
from typing import Any, Never

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder, latent_attention, sigmoid_experts
from amaxbridge.mappings.families.deepseek_v3 import DEEPSEEK_V3, LAYER
from amaxbridge.mappings.family import HFConfig, Translation, look_up
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.weights import ReplicatedMapping

_MEGATRON, _HF = f"{latent_attention.MEGATRON}.core_attention.indexer", f"{latent_attention.HF}.indexer"
_INDEXER: tuple[MegatronParamMapping, ...] = tuple(
    ReplicatedMapping(f"{_MEGATRON}.{name}", f"{_HF}.{hf_name}")
    for name, hf_name in (
        ("linear_wq_b.weight", "wq_b.weight"),
        ("linear_wk.weight", "wk.weight"),
        ("k_norm.weight", "k_norm.weight"),
        ("k_norm.bias", "k_norm.bias"),
        ("linear_weights_proj.weight", "weights_proj.weight"),
    )
)
"""Whole on every rank, as Megatron builds them: megatron.core.transformer.experimental_attention_variant.dsa."""
_LAYER = (*LAYER[: len(latent_attention.ATTENTION)], *_INDEXER, *LAYER[len(latent_attention.ATTENTION) :])


def _refuse(hf_config: HFConfig) -> Never:
    raise UsageError(
        "Megatron has sparse attention on Transformer Engine's layers only: models with an indexer are exported, and "
        "not built here"
    )


def _schedule(hf_config: HFConfig) -> dict[str, Any]:
    """Megatron's settings of the schedule by which layers share an indexer. Its offset counts only if they do.

    Raises:
        UsageError: the layers that have an indexer follow no schedule, as in a pattern of one's own, or another than
            engines are told.
    """
    freq, offset = (hf_config.get(name) for name in ("index_topk_freq", "index_skip_topk_offset"))
    freq, offset = freq or 1, 2 if offset is None else offset  # transformers' defaults
    layers = range(1, look_up(hf_config, "num_hidden_layers") + 1)
    scheduled = ["shared" if max(layer - max(offset, 1), 0) % freq else "full" for layer in layers]
    if list(look_up(hf_config, "indexer_types")) != scheduled:
        raise UsageError(
            f"indexer_types does not follow index_topk_freq={freq} and index_skip_topk_offset={offset}, the only kind "
            "of schedule that Megatron has: correct whichever is wrong"
        )
    return {"dsa_indexer_topk_freq": freq, **({"dsa_indexer_skip_topk_offset": offset} if freq > 1 else {})}


DEEPSEEK_V32 = replace(
    DEEPSEEK_V3,
    architectures=("DeepseekV32ForCausalLM",),
    mappings=(decoder.EMBEDDING, *_LAYER, *decoder.HEAD),
    exceptions=lambda hf_config: sigmoid_experts.mtp_layers(hf_config, _LAYER),
    transformer={
        **DEEPSEEK_V3.transformer,
        "moe_layer_freq": sigmoid_experts.LISTED_LAYERS,
        "dsa_indexer_n_heads": "index_n_heads",
        "dsa_indexer_head_dim": "index_head_dim",
        "dsa_indexer_topk": "index_topk",
    },
    requires={**DEEPSEEK_V3.requires, "mlp_bias": False, "index_topk_freq": 1, "index_topk_pattern": None},
    check=_refuse,
    constants={**DEEPSEEK_V3.constants, "experimental_attention_variant": "dsa"},
)
GLM_MOE_DSA = replace(
    DEEPSEEK_V32,
    architectures=("GlmMoeDsaForCausalLM",),
    requires={**DEEPSEEK_V3.requires, "mlp_bias": False},
    derived=Translation(_schedule),
)
