"""FP8, static: E4M3 weights and inputs with one scale each, `float-quantized` in compressed-tensors.

    weight        float8_e4m3fn  [out, in]
    weight_scale  float32        [1]   amax / 448, a multiplier; equal in a fused group
    input_scale   float32        [1]   amax / 448 of the input; equal in a fused group

vLLM keeps one weight scale for a fused group, the largest of its members, and requantizes members with another scale.
So a group shares its amax, as in training, where q, k and v are one weight with one quantizer.
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import arguments

_TENSOR = arguments(8, "float", "tensor")

FP8 = Scaled(
    "fp8",
    format="fp8",
    config_group={"format": "float-quantized", "weights": _TENSOR, "input_activations": _TENSOR},
    code=Code.E4M3,
    share=Blocks(height=None, width=None),
    weight_quantizer=QuantizerSettings((4, 3)),
    input_quantizer=QuantizerSettings((4, 3)),
)
