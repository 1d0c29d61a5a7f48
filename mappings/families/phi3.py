"""Phi-3 and Phi-4: a Llama or Mistral whose files fuse q, k and v, and gate and up.

Phi-4-mini rotates a part of each head.
"""

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.weights import PackedQKVMapping

_QKV = PackedQKVMapping(
    f"{decoder.MEGATRON}.self_attention.linear_qkv.weight", f"{decoder.HF}.self_attn.qkv_proj.weight"
)

PHI3 = ModelFamily(
    architectures=("Phi3ForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        decoder.INPUT_NORM,
        _QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        decoder.GATE_UP_PACKED,
        decoder.DOWN,
        *decoder.HEAD,
    ),
    transformer={**decoder.DECODER_SIZES, "window_size": decoder.WINDOW},
    computes=decoder.PLAIN_DECODER,
    model={**decoder.MODEL_ARGUMENTS, **decoder.ROPE_SCALING, "rotary_percent": decoder.PARTIAL_ROTARY},
    constants=decoder.GATED_RMSNORM_DECODER,
    alike=("LlamaForCausalLM", "MistralForCausalLM"),
)
