"""The family of My Llama, a Llama with three changes:

another norm name   attention_norm in place of input_layernorm
a renamed module    feed_forward in place of mlp
an added norm       output_norm, after the MLP

amaxbridge export checkpoint=CKPT hf=HF_DIR output=OUT family=my_llama.py
amaxbridge import hf=OUT output=CKPT family=my_llama.py
"""

from typing import Any

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.weights import GatedMLPMapping, ReplicatedMapping, RowParallelMapping

LAYER, HF_LAYER = "decoder.layers.*", "model.layers.*"
MLP, HF_MLP = f"{LAYER}.mlp", f"{HF_LAYER}.feed_forward"
ATTENTION_NORM, QKV = decoder.QKV


def layer(spec: Any, config: Any) -> Any:
    """Megatron's own layer with the added norm. The import is here because an export needs no Megatron."""
    from my_llama_layers import with_output_norm

    return with_output_norm(spec)


FAMILY = ModelFamily(
    architectures=("MyLlamaForCausalLM",),
    mappings=(
        decoder.EMBEDDING,
        ReplicatedMapping(ATTENTION_NORM.megatron_param, f"{HF_LAYER}.attention_norm.weight"),
        QKV,
        decoder.ATTENTION_OUTPUT,
        decoder.MLP_NORM,
        GatedMLPMapping(
            f"{MLP}.linear_fc1.weight",
            gate=f"{HF_MLP}.gate_proj.weight",
            up=f"{HF_MLP}.up_proj.weight",
        ),
        RowParallelMapping(f"{MLP}.linear_fc2.weight", f"{HF_MLP}.down_proj.weight"),
        ReplicatedMapping(f"{LAYER}.output_norm.weight", f"{HF_LAYER}.output_norm.weight"),
        *decoder.HEAD,
    ),
    transformer=decoder.DECODER_SIZES,
    requires=decoder.NO_BIASES,
    computes=decoder.PLAIN_DECODER,
    model=decoder.MODEL_ARGUMENTS,
    constants=decoder.GATED_RMSNORM_DECODER,
    layer=layer,
)
