"""NVFP4, W4A4: 4-bit weights and activations in blocks of 16, `nvfp4-pack-quantized` in compressed-tensors.

Tensors of a module with weight `[out, in]`:

    weight_packed        uint8          [out, in/2]    two e2m1 values a byte, the even column in the low nibble
    weight_scale         float8_e4m3fn  [out, in/16]   one scale a block
    weight_global_scale  float32        [1]            2688 / amax, a divisor; equal in a fused group
    input_global_scale   float32        [1]            2688 / amax of the input, a divisor; equal in a fused group

`scale_dtype` of the input is not decoration: without it compressed-tensors (and so transformers) leaves the block
scales of the activations unrounded, and 86 % of bf16 activations differ from what training and the GPU kernels
compute, against 0.4 % with it. vLLM 0.10.2 to 0.13, whose compressed-tensors does not know the key, refuse it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.nvfp4 import BLOCK, Arithmetic, NVFP4Weight
from amaxbridge.export.schemes.scheme import arguments
from amaxbridge.mappings.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class NVFP4:
    """NVFP4 weights, and activations where `needs_input_amax`."""

    name: str = "nvfp4"
    needs_input_amax: bool = True
    needs_weight_amax: bool = True
    format: str = "nvfp4"

    @property
    def config_group(self) -> dict[str, Any]:
        blocks = arguments(4, "float", "tensor_group", group_size=BLOCK)
        inputs = {**blocks, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
        return {
            "format": "nvfp4-pack-quantized",
            "weights": blocks,
            "input_activations": inputs if self.needs_input_amax else None,
        }

    def output_specs(self, module: str, weight: TensorSpec, *, calibrated: bool) -> dict[str, TensorSpec]:
        if len(weight.shape) != 2 or weight.shape[1] % BLOCK:
            raise ValueError(f"NVFP4 needs [out, in] with in divisible by {BLOCK}, not {list(weight.shape)}")
        rows, columns = weight.shape
        specs = {
            f"{module}.weight_packed": TensorSpec((rows, columns // 2), torch.uint8),
            f"{module}.weight_scale": TensorSpec((rows, columns // BLOCK), torch.float8_e4m3fn),
            f"{module}.weight_global_scale": TensorSpec((1,), torch.float32),
        }
        if self.needs_input_amax:
            specs[f"{module}.input_global_scale"] = TensorSpec((1,), torch.float32)
        return specs

    @property
    def row_step(self) -> int:
        return 1

    def measure(self, rows: Tensor, *, calibrated: bool) -> Tensor:
        return nvfp4.tensor_amax([rows], arithmetic=Arithmetic.of(calibrated=calibrated))

    def constants(self, module: str, weight: TensorSpec, amax: GroupAmax) -> dict[str, Tensor]:
        assert amax.weight is not None, f"{module}: not measured"
        arithmetic = Arithmetic.of(calibrated=amax.calibrated)
        divisor = nvfp4.global_scale(amax.weight, arithmetic=arithmetic, dtype=weight.dtype)
        constants = {f"{module}.weight_global_scale": divisor}
        if self.needs_input_amax:
            assert amax.input is not None, f"{module}: W4A4 needs an input amax"
            constants[f"{module}.input_global_scale"] = nvfp4.input_global_scale(amax.input)
        return constants

    def quantize_rows(
        self, module: str, rows: Tensor, amax: GroupAmax, block_amax: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert amax.weight is not None, f"{module}: not measured"
        arithmetic = Arithmetic.of(calibrated=amax.calibrated)
        quantized = nvfp4.quantize(rows, amax.weight, arithmetic=arithmetic, block_amax=block_amax)
        return {f"{module}.weight_packed": quantized.packed, f"{module}.weight_scale": quantized.block_scale}

    def dequantize(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return nvfp4.dequantize(NVFP4Weight(*(tensors[f"{module}.{name}"] for name in names)))
