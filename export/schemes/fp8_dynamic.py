"""FP8, dynamic: E4M3 weights with a scale for each row, `float-quantized`; engines scale each token at run time.

weight        float8_e4m3fn  [out, in]
weight_scale                 [out, 1]   amax / 448, a multiplier: fp32 if calibrated, else in the weight's dtype
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import arguments

FP8_DYNAMIC = Scaled(
    "fp8_dynamic",
    format="fp8_channel",
    config_group={
        "format": "float-quantized",
        "weights": arguments(8, "float", "channel"),
        "input_activations": arguments(8, "float", "token", dynamic=True),
    },
    code=Code.E4M3,
    share=Blocks(),
    weight_quantizer=QuantizerSettings((4, 3), axis=0),
    input_quantizer=QuantizerSettings((4, 3), block_sizes={-1: None}, type="dynamic"),
)
