"""Vectors by which input quantizers multiply inputs (AWQ, SmoothQuant), folded into what makes these inputs.

Calibration divides the columns of a weight by a vector and lets the input quantizer multiply inputs by it, enabled or
not. Engines have no place for it. Where a norm feeds one linear and nothing else, the norm's weight takes the vector,
as in ModelOpt's exporter (`fuse_prequant_layernorm`), and the linear keeps the weight that was quantized:

    decoder.layers.0.self_attention.linear_qkv   decoder.layers.0.input_layernorm
    decoder.layers.0.self_attention.in_proj      decoder.layers.0.input_layernorm
    decoder.layers.0.mlp.linear_fc1              decoder.layers.0.pre_mlp_layernorm

Where inputs are linear in the outputs of another linear, that one's rows and biases take the vector
(`fuse_prequant_to_linear`), here with the codes of training:

    decoder.layers.0.self_attention.linear_proj  v of decoder.layers.0.self_attention.linear_qkv
    decoder.layers.0.mlp.linear_fc2              up of decoder.layers.0.mlp.linear_fc1, also in experts

A norm before experts also feeds their router, and other inputs come from neither: `Finalizer` refuses those, unless the
weight is written unquantized. Then its columns take the vector.
"""

import re
from collections.abc import Collection, Mapping

from amaxbridge.mappings.amax import PRE_QUANT_SCALE
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.weights import GatedMLPMapping, QKVMapping

_NORM_OF = {
    "self_attention.linear_qkv": "input_layernorm.weight",
    "self_attention.in_proj": "input_layernorm.weight",
    "mlp.linear_fc1": "pre_mlp_layernorm.weight",
}
_AFTER_A_LINEAR = re.compile(
    r"(.+\.)(self_attention\.linear_proj|mlp\.(?:shared_experts\.|experts\.)?linear_fc2)"
    r"\.input_quantizer(?:\.(\d+))?\._pre_quant_scale"
)
_BEFORE = {"linear_proj": "linear_qkv", "linear_fc2": "linear_fc1"}


def norms_with_linears(names: Collection[str]) -> dict[str, str]:
    """Norm → the vector of the linear that it feeds, by Megatron name. Both must be in one bundle.

    Args:
        names: every Megatron tensor of a model, quantizer state included.
    """
    found = dict[str, str]()
    for name in names:
        linear = name.removesuffix(PRE_QUANT_SCALE)
        for place, norm in _NORM_OF.items():
            layer = linear.removesuffix(place)
            if linear != name and layer != linear and layer.endswith(".") and f"{layer}{norm}" in names:
                found[f"{layer}{norm}"] = name
    return found


def linears_before(mappings: Mapping[str, MegatronParamMapping]) -> dict[str, str]:
    """Vector of a linear → the weight whose outputs make its inputs, by Megatron name. Both must be in one bundle.

    Args:
        mappings: the resolved mapping of every Megatron tensor of a model, quantizer state included.
    """
    found = dict[str, str]()
    for name in mappings:
        match = _AFTER_A_LINEAR.fullmatch(name)
        if match is not None:
            path, _, linear = match[2].rpartition(".")
            weight = f"{match[1]}{path}.{_BEFORE[linear]}.weight{match[3] or ''}"
            if isinstance(mappings.get(weight), QKVMapping | GatedMLPMapping):
                found[name] = weight
    return found


def module_before(mapping: MegatronParamMapping) -> str:
    """The Hugging Face module whose outputs make the inputs: v or up of a mapping in `linears_before`."""
    assert isinstance(mapping, QKVMapping | GatedMLPMapping)
    return module_of(mapping.v if isinstance(mapping, QKVMapping) else mapping.up)
