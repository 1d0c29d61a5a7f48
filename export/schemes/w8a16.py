"""W8A16: 8-bit integers in groups of columns, 16-bit activations, `pack-quantized` in compressed-tensors.

weight_packed  int32  [out, in/4]       four codes plus 128 a word, the first column in the low bits
weight_scale          [out, in/group]   amax / 127 if calibrated, else amax / 127.5; in the weight's dtype
weight_shape   int64  [2]               [out, in]
"""

from amaxbridge.export.schemes.packed_integers import packed_integers
from amaxbridge.export.schemes.scaled import Scaled


def w8a16(group_size: int = 128) -> Scaled:
    """The scheme for groups of `group_size` columns, -1 for whole rows."""
    return packed_integers("w8a16", 8, group_size, w8a16)
