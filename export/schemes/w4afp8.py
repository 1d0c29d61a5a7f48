"""W4AFP8: 4-bit integers in groups of 128 columns, FP8 inputs that engines scale token by token, `pack-quantized`.

weight_packed  int32  [out, in/8]       eight codes plus 8 a word, the first column in the low bits
weight_scale          [out, in/group]   amax / 7 if calibrated, else amax / 7.5; in the weight's dtype
weight_shape   int64  [2]               [out, in]

vLLM has a kernel for Hopper alone (read, not run), for bf16 outputs and sizes that 128 divides. It rounds the scales of
groups to E4M3 under a scale for each row, so weights are rounded once more there.
"""

from amaxbridge.export.schemes.packed_integers import packed_integers
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import ShardMultiple, arguments

_TILE = 128  # outputs, inputs and columns of a group


def w4afp8(group_size: int = _TILE) -> Scaled:
    """The scheme for groups of `group_size` columns. Engines have a kernel for 128."""
    return packed_integers(
        "w4afp8",
        4,
        group_size,
        w4afp8,
        inputs=arguments(8, "float", "token", dynamic=True),
        input_quantizer=QuantizerSettings((4, 3), block_sizes={-1: None}, type="dynamic"),
        group_sizes=(_TILE,),
        kernel_tiles=((_TILE, _TILE),),
        shard_multiple=ShardMultiple(_TILE, _TILE),
    )
