"""W4A16 with zero points: the tensors of `w4a16` and one more.

weight_scale              [out, in/group]     (max - min) / 15
weight_zero_point  int32  [out/8, in/group]   eight rows a word, plus 8, the first row in the low bits
"""

from amaxbridge.export.schemes.packed_integers import packed_integers
from amaxbridge.export.schemes.scaled import Scaled


def w4a16_asym(group_size: int = 128) -> Scaled:
    """The scheme for groups of `group_size` columns, -1 for whole rows."""
    return packed_integers("w4a16_asym", 4, group_size, w4a16_asym, symmetric=False)
