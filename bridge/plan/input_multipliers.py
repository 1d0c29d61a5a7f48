"""Vectors by which input quantizers multiply inputs (AWQ, SmoothQuant), folded into the norm before.

Calibration divides the columns of a weight by a vector and lets the input quantizer multiply inputs by it, enabled or
not. Engines have no place for it. Where a norm feeds one linear and nothing else, the norm's weight takes the vector,
as in ModelOpt's exporter (`fuse_prequant_layernorm`), and the linear keeps the weight that was quantized:

    decoder.layers.0.self_attention.linear_qkv   decoder.layers.0.input_layernorm
    decoder.layers.0.mlp.linear_fc1              decoder.layers.0.pre_mlp_layernorm

A norm before experts also feeds their router, and other inputs are no norm's output: `Finalizer` refuses those, unless
the weight is written unquantized. Then its columns take the vector.
"""

from collections.abc import Collection

from amaxbridge.mappings.amax import PRE_QUANT_SCALE

_NORM_OF = {
    "self_attention.linear_qkv": "input_layernorm.weight",
    "mlp.linear_fc1": "pre_mlp_layernorm.weight",
}


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
