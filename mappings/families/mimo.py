"""MiMo-7B: a Qwen2 with layers that predict further tokens (MTP), which files number from 0 in a list of their own.

transformers has no class of it; its decoder is Qwen2's. Both sides project the hidden state and the next token's
embedding together, in opposite order.
"""

from collections.abc import Iterator
from dataclasses import replace

from amaxbridge.mappings.families import decoder, sigmoid_experts
from amaxbridge.mappings.families.qwen2 import QWEN2
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.weights import ReplicatedMapping, SwappedHalvesMapping

_MTP, _HF_MTP = "mtp.layers.*", "model.mtp_layers.*"
_NORMS = {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "final_layernorm": "final_layernorm"}


def _mtp_layer() -> Iterator[MegatronParamMapping]:
    for mapping in QWEN2.mappings:
        if mapping.megatron_param.startswith(decoder.MEGATRON):
            megatron_param = mapping.megatron_param.replace(decoder.MEGATRON, f"{_MTP}.mtp_model_layer")
            yield mapping.rename(megatron_param, lambda name: name.replace(decoder.HF, _HF_MTP))
    yield SwappedHalvesMapping(f"{_MTP}.eh_proj.weight", f"{_HF_MTP}.input_proj.weight")
    for megatron, hf in _NORMS.items():
        yield ReplicatedMapping(f"{_MTP}.{megatron}.weight", f"{_HF_MTP}.{hf}.weight")


MIMO = replace(
    QWEN2,
    architectures=("MiMoForCausalLM",),
    mappings=(*QWEN2.mappings, *_mtp_layer()),
    transformer={**QWEN2.transformer, "mtp_num_layers": sigmoid_experts.MTP_COUNT},
    requires={"attention_bias": True, "mlp_bias": False},
    language_model=("Qwen2ForCausalLM", ""),
    alike=QWEN2.architectures,
)
