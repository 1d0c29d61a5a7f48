"""W8A8: 8-bit integer weights with a scale for each row, `int-quantized`; engines scale each token at run time.

weight        int8  [out, in]
weight_scale        [out, 1]   amax / 127 in fp32 if calibrated, else amax / 127.5 in the weight's dtype
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import arguments

W8A8 = Scaled(
    "w8a8",
    format="int8",
    config_group={
        "format": "int-quantized",
        "weights": arguments(8, "int", "channel"),
        "input_activations": arguments(8, "int", "token", dynamic=True),
    },
    code=Code.INT8,
    share=Blocks(),
    weight_quantizer=QuantizerSettings(8, axis=0),
    input_quantizer=QuantizerSettings(8, block_sizes={-1: None}, type="dynamic"),
)
