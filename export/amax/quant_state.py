"""The quantizer state of a model in Hugging Face names.

It depends neither on Megatron nor on an output format: amax by quantizer name, and the formats of each quantized
module's weight and input quantizers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from amaxbridge.mappings.amax import GLOBAL_AMAX, INPUT_QUANTIZER, WEIGHT_QUANTIZER


class Divergence(NamedTuple):
    """The least and the greatest amax that the ranks held for one quantizer."""

    least: float
    greatest: float

    def __str__(self) -> str:
        return (
            f"{self.least:.6g} to {self.greatest:.6g} ({self.greatest / self.least - 1:+.1%})"
            if self.least
            else (f"{self.least:.6g} to {self.greatest:.6g}")
        )


@dataclass(frozen=True)
class QuantState:
    """Quantizer state in Hugging Face names.

    Args:
        amax: quantizer buffer name (`….q_proj.weight_quantizer._amax`) → fp32 tensor on the CPU, `[]` per-tensor.
        formats: quantized module (`….q_proj`) → name of the format of its weight quantizer (`nvfp4`, `fp8`, …), and
            quantizer of the key-value cache (`….self_attn.k_bmm_quantizer`) → its own.
        missing: buffer names of enabled static quantizers that were never calibrated.
        divergent: buffer names whose amax differed between ranks; `amax` holds the maximum.
        inputs: module → format of its enabled input quantizer, in words (`e4m3 per tensor`). None if unknown.
    """

    amax: Mapping[str, Tensor] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    divergent: Mapping[str, Divergence] = field(default_factory=dict)
    inputs: Mapping[str, str] | None = None

    def weight_amax(self, module: str) -> Tensor | None:
        """The per-tensor amax of a weight; for a per-block one, training's global amax or the blocks' own."""
        return self.amax.get(self.weight_amax_name(module))

    def weight_amax_name(self, module: str) -> str:
        """The name of the buffer that `weight_amax` takes."""
        return module + (GLOBAL_AMAX if module + GLOBAL_AMAX in self.amax else WEIGHT_QUANTIZER)

    def input_amax(self, module: str) -> Tensor | None:
        """The per-tensor amax of a module's input."""
        return self.amax.get(module + INPUT_QUANTIZER)

    def calibrates_input(self, module: str) -> bool:
        """True if the module has a static input quantizer, calibrated or not."""
        return module + INPUT_QUANTIZER in self.amax or module + INPUT_QUANTIZER in self.missing
