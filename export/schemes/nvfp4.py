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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.fused_scales import GroupAmax
from export.kernels import nvfp4
from export.kernels.nvfp4 import BLOCK, Arithmetic, NVFP4Weight
from mappings.tensors import TensorSpec

_BLOCKS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "symmetric": True,
}


@dataclass(frozen=True, slots=True)
class NVFP4:
    """NVFP4 weights and activations, with the amax and the arithmetic of the training run."""

    name: str = "nvfp4"
    format: str = "nvfp4"
    quantizes_inputs: bool = True

    def output_specs(self, module: str, weight: TensorSpec) -> dict[str, TensorSpec]:
        if len(weight.shape) != 2 or weight.shape[1] % BLOCK:
            raise ValueError(f"NVFP4 needs [out, in] with in divisible by {BLOCK}, not {list(weight.shape)}")
        rows, columns = weight.shape
        return {
            f"{module}.weight_packed": TensorSpec((rows, columns // 2), torch.uint8),
            f"{module}.weight_scale": TensorSpec((rows, columns // BLOCK), torch.float8_e4m3fn),
            f"{module}.weight_global_scale": TensorSpec((1,), torch.float32),
            f"{module}.input_global_scale": TensorSpec((1,), torch.float32),
        }

    def quantize(
        self, module: str, weight: Tensor, amax: GroupAmax, weight_amax: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert amax.weight is not None and amax.input is not None, f"{module}: W4A4 needs both amax"
        quantized = nvfp4.quantize(weight, amax.weight, arithmetic=Arithmetic.MODELOPT, block_amax=weight_amax)
        return {
            f"{module}.weight_packed": quantized.packed,
            f"{module}.weight_scale": quantized.block_scale,
            f"{module}.weight_global_scale": quantized.global_scale,
            f"{module}.input_global_scale": nvfp4.input_global_scale(amax.input),
        }

    def dequantize(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return nvfp4.dequantize(NVFP4Weight(*(tensors[f"{module}.{name}"] for name in names)))

    def config(self, ignore: Iterable[str]) -> dict[str, Any]:
        group = {
            "targets": ["Linear"],
            "weights": {**_BLOCKS, "dynamic": False},
            "input_activations": {**_BLOCKS, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"},
            "output_activations": None,
            "format": "nvfp4-pack-quantized",
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
        }
