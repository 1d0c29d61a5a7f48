"""W4A16: 4-bit integers in groups of columns, 16-bit activations, `pack-quantized` in compressed-tensors.

weight_packed  int32  [out, in/8]       eight codes plus 8 a word, the first column in the low bits
weight_scale          [out, in/group]   amax / 7 if calibrated, else amax / 7.5; in the weight's dtype, as in engines
weight_shape   int64  [2]               [out, in]

Rounding a calibrated scale to bf16 moves its codes by 2^-9 of themselves at most. They stay those of training, under
`amax / 7` in fp32: codes chosen under the rounded scale would be another in 0.3 % of places, a whole step from what
training computed, and no nearer to the weight.
"""

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import arguments

GROUP_SIZES = (32, 64, 128)
"""Those that Marlin has, the kernel of vLLM and SGLang."""


def quantizer_format(group_size: int) -> str:
    """What the weight quantizers of a trained model must be, in the words of `Scheme.format`."""
    return "int4" if group_size == 128 else f"int4 group_size={group_size}"


def w4a16(group_size: int = 128) -> Scaled:
    """The scheme for groups of `group_size` columns."""
    return Scaled(
        "w4a16",
        format=quantizer_format(group_size),
        code=Code.INT4,
        blocks=Blocks(width=group_size),
        group_sizes=GROUP_SIZES,
        config_group={
            "format": "pack-quantized",
            "weights": arguments(4, "int", "group", group_size=group_size),
            "input_activations": None,
        },
    )
