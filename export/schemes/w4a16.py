"""W4A16: 4-bit integers in groups of columns, 16-bit activations, `pack-quantized` in compressed-tensors.

weight_packed  int32  [out, in/8]       eight codes plus 8 a word, the first column in the low bits
weight_scale          [out, in/group]   amax / 7 if calibrated, else amax / 7.5; in the weight's dtype, as in engines
weight_shape   int64  [2]               [out, in]
"""

from amaxbridge.export.schemes.packed_integers import packed_integers
from amaxbridge.export.schemes.scaled import Scaled


def w4a16(group_size: int = 128) -> Scaled:
    """The scheme for groups of `group_size` columns, -1 for whole rows."""
    return packed_integers("w4a16", 4, group_size, w4a16)
