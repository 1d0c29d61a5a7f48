"""Packed integers with scales for groups of columns, `pack-quantized`: what W4A16 and its relatives share.

weight_packed      int32  [out, in / codes a word]     codes offset to be unsigned, the first column in the low bits
weight_scale              [out, in / group]            in the weight's dtype, as engines hold it
weight_shape       int64  [2]                          [out, in]
weight_zero_point  int32  [out / codes a word, in / group]   asymmetric only: packed as codes are, along the rows

Rounding a calibrated scale to bf16 changes dequantized weights by a factor of at most 1 ± 2^-9. The codes stay
training's, under `amax / bound` in fp32: 0.3 % of codes chosen under the rounded scale would differ, by a whole step
from what training computed, and would be no nearer to the weight.
"""

from collections.abc import Callable
from typing import Any

from amaxbridge.export.kernels.scaled import Blocks, Code
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.schemes.scheme import ShardMultiple, arguments

WHOLE_ROW = -1
"""The group size for whole rows."""
_USUAL = 128
GROUP_SIZES = (32, 64, 128)
"""The group sizes of Marlin, the kernel of vLLM and SGLang."""
_MARLIN_TILES = ((64, 128), (128, 64))


def packed_integers(
    name: str,
    bits: int,
    group_size: int,
    sized: Callable[[int], Scaled],
    *,
    symmetric: bool = True,
    inputs: dict[str, Any] | None = None,
    input_quantizer: QuantizerSettings | None = None,
    group_sizes: tuple[int, ...] = GROUP_SIZES,
    kernel_tiles: tuple[tuple[int, int], ...] = _MARLIN_TILES,
    shard_multiple: ShardMultiple | None = None,
) -> Scaled:
    """A scheme of packed integers.

    Args:
        name: name of the scheme.
        bits: bits of a code, 4 or 8.
        group_size: columns that share a scale; `WHOLE_ROW` for all.
        sized: makes this scheme with another group size.
        symmetric: False for zero points, for which ModelOpt has no quantizers.
        inputs: arguments of the activations; None leaves them in 16 bits.
        input_quantizer: settings of ModelOpt's input quantizers.
        group_sizes: group sizes for which engines have kernels; by default Marlin's.
        kernel_tiles: as in `Scheme`; by default Marlin's.
        shard_multiple: as in `Scheme`; by default whole groups.
    """
    if group_size == WHOLE_ROW:
        word, share = f"int{bits}" if bits == 8 else f"int{bits}_channel", Blocks()
        weights = arguments(bits, "int", "channel", symmetric=symmetric)
        quantizer = QuantizerSettings(bits, axis=0)
    else:
        word, share = f"int{bits} group_size={group_size}", Blocks(width=group_size)
        if (bits, group_size) == (4, _USUAL):
            word = "int4"
        weights = arguments(bits, "int", "group", group_size=group_size, symmetric=symmetric)
        quantizer = QuantizerSettings(bits, block_sizes={-1: group_size, "type": "static"})
    return Scaled(
        name,
        format=word if symmetric else "",
        config_group={"format": "pack-quantized", "weights": weights, "input_activations": inputs},
        code=Code.INT4 if bits == 4 else Code.INT8,
        share=share,
        sized=sized,
        weight_quantizer=quantizer if symmetric else None,
        input_quantizer=input_quantizer,
        shard_multiple=shard_multiple or ShardMultiple(inputs=share.width or 1),
        kernel_tiles=kernel_tiles,
        group_sizes=group_sizes,
    )
