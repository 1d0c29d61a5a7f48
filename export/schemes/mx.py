"""The MX formats: small floats in blocks of 32 columns under a power of two. `mxfp4.py` and `mxfp8.py` name them.

Nothing is calibrated: scales come from the weights, and engines scale activations, in blocks too, as they come.
`scale_dtype` is what tells compressed-tensors that scales are powers of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.kernels import e2m1, mx
from amaxbridge.export.kernels.nvfp4 import Arithmetic
from amaxbridge.export.schemes.scheme import arguments
from amaxbridge.mappings.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class MX:
    """MX weights of 4 or 8 bits, and activations unless `weights_only`."""

    name: str
    bits: int
    disk_format: str
    weights_only: bool = False
    needs_weight_amax: bool = False
    needs_input_amax: bool = False

    @property
    def format(self) -> str:
        return f"mxfp{self.bits}"

    @property
    def config_group(self) -> dict[str, Any]:
        blocks = arguments(self.bits, "float", "group", group_size=mx.BLOCK, scale_dtype="torch.uint8")
        inputs = None if self.weights_only else {**blocks, "dynamic": True}
        return {"format": self.disk_format, "weights": blocks, "input_activations": inputs}

    def output_specs(self, module: str, weight: TensorSpec, *, calibrated: bool) -> dict[str, TensorSpec]:
        if len(weight.shape) != 2 or weight.shape[1] % mx.BLOCK:
            raise ValueError(f"{self.name} needs [out, in] with in divisible by {mx.BLOCK}, not {list(weight.shape)}")
        rows, columns = weight.shape
        codes = TensorSpec((rows, columns), torch.float8_e4m3fn)
        if self.bits == 4:
            codes = TensorSpec((rows, columns // 2), torch.uint8)
        scales = TensorSpec((rows, columns // mx.BLOCK), torch.uint8)
        return {self._codes(module): codes, f"{module}.weight_scale": scales}

    @property
    def row_step(self) -> int:
        return 1

    def measure(self, rows: Tensor, *, calibrated: bool) -> None:
        return None

    def constants(self, module: str, weight: TensorSpec, amax: GroupAmax) -> dict[str, Tensor]:
        return {}

    def quantize_rows(
        self, module: str, rows: Tensor, amax: GroupAmax, block_amax: Tensor | None = None
    ) -> dict[str, Tensor]:
        quantize = mx.quantize_mxfp4 if self.bits == 4 else mx.quantize_mxfp8
        codes, exponents = quantize(rows, Arithmetic.of(calibrated=amax.calibrated))
        return {self._codes(module): codes, f"{module}.weight_scale": exponents}

    def dequantize(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors[self._codes(module)]
        return mx.dequantize(e2m1.unpack(codes) if self.bits == 4 else codes, tensors[f"{module}.weight_scale"])

    def _codes(self, module: str) -> str:
        return f"{module}.weight_packed" if self.bits == 4 else f"{module}.weight"
