"""W8A8: 8-bit integer weights with a scale for each row, `int-quantized`; engines scale each token as it comes.

weight        int8  [out, in]
weight_scale        [out, 1]   amax / 127 in fp32 if calibrated, else amax / 127.5 in the weight's dtype
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import arguments

W8A8 = Scaled(
    "w8a8",
    format="int8",
    code=Code.INT8,
    blocks=Blocks(),
    config_group={
        "format": "int-quantized",
        "weights": arguments(8, "int", "channel"),
        "input_activations": arguments(8, "int", "token", dynamic=True),
    },
)
