"""Settings of ModelOpt's quantizers in its own words, without importing it: what schemes need."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

type Bits = int | tuple[int, int]

FOUR_OVER_SIX = " four_over_six"
"""Ending of a format whose blocks have a largest code of 4 or 6 under scales up to 256."""
LEARNED = " lsq"
"""Ending of a format whose block amax are learned: one that codes are chosen with, one that scales are made from."""
LEARNED_UNROUNDED = " lsq quantize_pre_scale=False"
"""As `LEARNED`, but the scale that codes are chosen with is not rounded to E4M3."""


@dataclass(frozen=True, slots=True)
class QuantizerSettings:
    """The attributes of a `TensorQuantizer` that decide what it computes. None is left at ModelOpt's default.

    Args:
        num_bits: bits of an integer, or exponent and mantissa bits of a float.
        axis: the dim whose slices have an amax each; None for a single amax.
        block_sizes: `{-1: 16}` for blocks of 16 columns, `{-1: None}` for rows, and `type` and `scale_bits` of scales.
        type: `dynamic` if the amax is computed anew for each tensor.
    """

    num_bits: Bits
    axis: int | None = None
    block_sizes: Mapping[Any, Any] | None = None
    type: str | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """The settings as ModelOpt's `QuantizerAttributeConfig` takes them."""
        others = {"block_sizes": self.block_sizes and dict(self.block_sizes), "type": self.type}
        return {
            "num_bits": self.num_bits,
            "axis": self.axis,
            **{name: value for name, value in others.items() if value is not None},
        }

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for quantizers that round weights alike."""
        return settings_key(self.num_bits, self.axis, self.block_sizes)

    @property
    def input_format(self) -> str:
        """The format in words, equal for quantizers that round inputs alike."""
        return input_format(self.num_bits, self.axis, self.block_sizes, dynamic=self.type == "dynamic")


BLOCKS_OF_E2M1 = QuantizerSettings((2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
"""NVFP4."""


def input_format(num_bits: Any, axis: Any, block_sizes: Mapping[Any, Any] | None, *, dynamic: bool) -> str:
    """The format of an input quantizer in words: `e2m1 in blocks of 16 with e4m3 scales`, `e4m3 per token`.

    ModelOpt turns the setting for whole tokens, `block_sizes={-1: None}`, into an axis when it first runs.
    """
    blocks = dict(block_sizes or {})
    width, scales, kind = blocks.pop(-1, 0), blocks.pop("scale_bits", None), blocks.pop("type", None)
    per_token = width is None or (isinstance(axis, tuple) and axis == tuple(range(len(axis))))
    if per_token and dynamic and not blocks:
        return f"{_bits(num_bits)} per token"
    words = [_bits(num_bits), f"in blocks of {width}" if width else "per tensor" if axis is None else f"axis={axis}"]
    words += [f"with {_bits(scales)} scales"] if scales else []
    words += [f"of {blocks}"] if blocks else []
    return " ".join(words) + (", static" if width and kind != "dynamic" else "") + (", dynamic" if dynamic else "")


def _bits(bits: Any) -> str:
    return f"e{bits[0]}m{bits[1]}" if isinstance(bits, tuple) and len(bits) == 2 else f"int{bits}"


def settings_key(num_bits: Any, axis: Any, block_sizes: Mapping[Any, Any] | None) -> tuple[Any, ...]:
    """What distinguishes the weight quantizers of the schemes: bits, axis, columns and rows of a block, scale bits."""
    blocks = block_sizes or {}
    along = None if blocks else axis  # ModelOpt sets the axis of a block quantizer at run time
    return num_bits, along, blocks.get(-1), blocks.get(-2), blocks.get("scale_bits")
