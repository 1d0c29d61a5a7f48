"""Multi-head latent attention, as DeepSeek's families have it: its weights, its sizes and its rotary embedding.

Megatron, vLLM and SGLang norm compressed queries and latents with `rms_norm_eps`; transformers does so with 1e-6,
whatever config.json says. The two differ for models with another epsilon, 1e-5 in Moonlight, Kimi-K2-Thinking and
GLM-4.7-Flash: an export computes in engines what training computed.
"""

from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, Source, Translation, look_up
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.weights import ColumnParallelMapping, LatentDownMapping, ReplicatedMapping

MEGATRON, HF = f"{decoder.MEGATRON}.self_attention", f"{decoder.HF}.self_attn"
_Q_ROWS = ("q_lora_rank",)
_KV_ROWS = ("kv_lora_rank", "qk_pos_emb_head_dim")

ATTENTION: tuple[MegatronParamMapping, ...] = (
    ReplicatedMapping(f"{decoder.MEGATRON}.input_layernorm.weight", f"{decoder.HF}.input_layernorm.weight"),
    ColumnParallelMapping(f"{MEGATRON}.linear_q_proj.weight", f"{HF}.q_proj.weight"),
    LatentDownMapping(f"{MEGATRON}.linear_q_down_proj.weight", f"{HF}.q_a_proj.weight", rows=_Q_ROWS),
    ReplicatedMapping(f"{MEGATRON}.q_layernorm.weight", f"{HF}.q_a_layernorm.weight"),
    ColumnParallelMapping(f"{MEGATRON}.linear_q_up_proj.weight", f"{HF}.q_b_proj.weight"),
    LatentDownMapping(f"{MEGATRON}.linear_kv_down_proj.weight", f"{HF}.kv_a_proj_with_mqa.weight", rows=_KV_ROWS),
    ReplicatedMapping(f"{MEGATRON}.kv_layernorm.weight", f"{HF}.kv_a_layernorm.weight"),
    ColumnParallelMapping(f"{MEGATRON}.linear_kv_up_proj.weight", f"{HF}.kv_b_proj.weight"),
    decoder.ATTENTION_OUTPUT,
)
"""Queries have a down and an up projection, or the plain one if `q_lora_rank` is None."""

SIZES: dict[str, Source] = {
    **{name: field for name, field in decoder.DECODER_SIZES.items() if name != "kv_channels"},
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
CONSTANTS = {**decoder.GATED_RMSNORM_DECODER, "multi_latent_attention": True, "qk_layernorm": True}


def _rope(hf_config: HFConfig) -> dict[str, Any]:
    """The rotary settings, which multi-head latent attention has in its TransformerConfig.

    Both sides rotate the pairs (0, 1), (2, 3), … of the rotary dims and return them as two halves, so no row moves.

    Raises:
        UsageError: Megatron lacks this rotary embedding.
    """
    rope = look_up(hf_config, "rope_parameters")
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise UsageError(f"Megatron's latent attention has no rope_type={kind!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError("Megatron's latent attention rotates all rotary dims, and has no partial_rotary_factor")
    if kind == "default":
        return {
            "rope_type": "rope",
            "rotary_base": look_up(hf_config, "rope_parameters.rope_theta"),
            "mscale_all_dim": 0.0,
        }
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    return {
        "rope_type": "yarn",
        "rotary_base": look_up(hf_config, "rope_parameters.rope_theta"),
        "rotary_scaling_factor": look_up(hf_config, "rope_parameters.factor"),
        "original_max_position_embeddings": look_up(hf_config, "rope_parameters.original_max_position_embeddings"),
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": scales[0] if all(scales) else 1.0,  # as in transformers: one of the two alone has no effect
        "mscale_all_dim": scales[1] or 0.0,
    }


def _rope_parameters(settings: Settings) -> dict[str, Any]:
    """Writes both mscales or neither, as transformers reads them. The rotary base is an argument of the model."""
    if settings["rope_type"] == "rope":
        return {"rope_parameters.rope_type": "default"}
    scales = ("mscale", "mscale_all_dim") if settings["mscale_all_dim"] else ()
    names = ("original_max_position_embeddings", "beta_fast", "beta_slow", *scales)
    rope = {"rope_type": "yarn", "factor": settings["rotary_scaling_factor"]}
    rope |= {name: settings[name] for name in names}
    return {f"rope_parameters.{name}": value for name, value in rope.items()}


ROPE = Translation(_rope, _rope_parameters)
