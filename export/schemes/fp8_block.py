"""FP8 in square blocks of 128, as DeepSeek-V3 is stored, `float-quantized`; engines scale every 128 inputs at run time.

weight        float8_e4m3fn  [out, in]
weight_scale                 [out/128, in/128] rounded up   amax / 448: fp32 if calibrated, else in the weight's dtype
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import ShardMultiple, arguments

_BLOCK = 128

FP8_BLOCK = Scaled(
    "fp8_block",
    format="fp8_block",
    config_group={
        "format": "float-quantized",
        "weights": arguments(8, "float", "block", block_structure=[_BLOCK, _BLOCK]),
        "input_activations": arguments(8, "float", "group", group_size=_BLOCK, dynamic=True),
    },
    code=Code.E4M3,
    share=Blocks(_BLOCK, _BLOCK),
    weight_quantizer=QuantizerSettings((4, 3), block_sizes={-1: _BLOCK, -2: _BLOCK}),
    shard_multiple=ShardMultiple(_BLOCK, _BLOCK, last_may_be_short=True),
)
