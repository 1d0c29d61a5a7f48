"""FP8, dynamic: E4M3 weights with a scale for each row, `float-quantized`; engines scale each token as it comes.

weight        float8_e4m3fn  [out, in]
weight_scale                 [out, 1]   amax / 448, a multiplier: fp32 if calibrated, else in the weight's dtype
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import arguments

FP8_DYNAMIC = Scaled(
    "fp8_dynamic",
    format="fp8_channel",
    code=Code.E4M3,
    blocks=Blocks(),
    config_group={
        "format": "float-quantized",
        "weights": arguments(8, "float", "channel"),
        "input_activations": arguments(8, "float", "token", dynamic=True),
    },
)
