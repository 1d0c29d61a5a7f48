"""W4A16 with zero points: the tensors of `w4a16` and one more.

weight_scale              [out, in/group]     (max - min) / 15
weight_zero_point  int32  [out/8, in/group]   eight rows a word, plus 8, the first row in the low bits
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import arguments
from amaxbridge.export.schemes.w4a16 import GROUP_SIZES


def w4a16_asym(group_size: int = 128) -> Scaled:
    """The scheme for groups of `group_size` columns."""
    return Scaled(
        "w4a16_asym",
        format="",  # ModelOpt has no quantizer with zero points for weights
        code=Code.INT4,
        blocks=Blocks(width=group_size),
        group_sizes=GROUP_SIZES,
        config_group={
            "format": "pack-quantized",
            "weights": arguments(4, "int", "group", group_size=group_size, symmetric=False),
            "input_activations": None,
        },
    )
