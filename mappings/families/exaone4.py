"""Exaone 4: norms after attention and MLP only; layers without a window have no rotary embedding if others have one."""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import HFConfig, ModelFamily, Translation, look_up


def _layers_without_rope(hf_config: HFConfig) -> list[int] | None:
    """1 for each layer with full attention, in a model with windows; as transformers' Exaone4Attention."""
    if not hf_config.get("sliding_window"):
        return None
    layers = [int(kind != "sliding_attention") for kind in look_up(hf_config, "layer_types")]
    return layers if any(layers) else None


EXAONE4 = ModelFamily(
    architectures=("Exaone4ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        decoder.QKV_WEIGHT,
        *decoder.QK_NORMS,
        decoder.ATTENTION_OUTPUT,
        *decoder.MLP,
        *decoder.norms_after("post_attention_layernorm", "post_feedforward_layernorm"),
        *decoder.HEAD,
    ),
    transformer=decoder.DECODER_SIZES,
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING},
    constants={**decoder.GATED_RMSNORM_DECODER, "qk_layernorm": True},
    layers={**decoder.WITH_NORMS_AFTER, **decoder.SLIDING_LAYERS, "no_rope_freq": Translation(_layers_without_rope)},
)
