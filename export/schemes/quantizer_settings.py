"""Settings of ModelOpt's quantizers in its own words, without importing it: what schemes need."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

type Bits = int | tuple[int, int]


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


def settings_key(num_bits: Any, axis: Any, block_sizes: Mapping[Any, Any] | None) -> tuple[Any, ...]:
    """What distinguishes the weight quantizers of the schemes: bits, axis, columns and rows of a block, scale bits."""
    blocks = block_sizes or {}
    along = None if blocks else axis  # ModelOpt sets the axis of a block quantizer at run time
    return num_bits, along, blocks.get(-1), blocks.get(-2), blocks.get("scale_bits")
