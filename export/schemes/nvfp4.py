"""NVFP4, W4A4: 4-bit weights and activations in blocks of 16, `nvfp4-pack-quantized` in compressed-tensors.

Tensors of a module with weight `[out, in]`:

    weight_packed        uint8          [out, in/2]    two e2m1 values a byte, the even column in the low nibble
    weight_scale         float8_e4m3fn  [out, in/16]   one scale a block
    weight_global_scale  float32        [1]            2688 / amax, a divisor; equal in a fused group
    input_global_scale   float32        [1]            2688 / amax of the input, a divisor; equal in a fused group

`scale_dtype` of the input matters: without it compressed-tensors, and so transformers, leaves the block scales of
    activations
unrounded, and 86 % of bf16 activations differ from what training and GPU kernels compute, against 0.4 % with it. vLLM
0.10.2 to 0.13, whose compressed-tensors does not know the key, refuse it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax, StackAmax
from amaxbridge.export.disk.row_chunks import Rows
from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.common_scale import energies_of_blocks
from amaxbridge.export.kernels.nvfp4 import BLOCK, FP4_MAX, FP8_MAX, SCALE_RANGE, NVFP4Weight
from amaxbridge.export.kernels.nvfp4_scales import FOUR_OVER_SIX_MAX, global_scales
from amaxbridge.export.kernels.restore import restore_nvfp4
from amaxbridge.export.kernels.scaled import Blocks
from amaxbridge.export.schemes.quantizer_settings import (
    BLOCKS_OF_E2M1,
    FOUR_OVER_SIX,
    LEARNED,
    LEARNED_UNROUNDED,
)
from amaxbridge.export.schemes.scheme import NO_TENSORS, Scheme, ShardMultiple, arguments
from amaxbridge.mappings.tensors import TensorSpec

WEIGHTS = arguments(4, "float", "tensor_group", group_size=BLOCK)
WHOLE_BLOCKS = ShardMultiple(inputs=BLOCK)  # otherwise engines load a shard and read wrong blocks
_CALIBRATIONS: Mapping[str, float] = MappingProxyType(
    {"": FP8_MAX, FOUR_OVER_SIX: FOUR_OVER_SIX_MAX, LEARNED: FP8_MAX, LEARNED_UNROUNDED: FP8_MAX}
)
"""Ways of quantizers to make block scales → the largest block scale under a global scale."""
_GLOBAL = SharedScale("weight_global_scale", SCALE_RANGE, is_divisor=True)


@dataclass(frozen=True)
class NVFP4Scheme(Scheme):
    """E2M1 blocks under E4M3 scales, and these under a global scale.

    Quantizers make the scales of blocks in several ways, `_CALIBRATIONS`. What is stored has one form.

    Args:
        calibration: the way, as the ending of the format in a `QuantState`; "" for scales from block amax.
    """

    calibration: str = field(default="", kw_only=True)

    def suited(self, found: str) -> "NVFP4Scheme | None":
        calibration = found.removeprefix(self.format)
        fits = found.startswith(self.format) and calibration in _CALIBRATIONS
        return replace(self, calibration=calibration) if fits else None

    @property
    def blocks(self) -> Blocks:
        return Blocks(width=BLOCK)

    @property
    def group_scale(self) -> SharedScale:
        return _GLOBAL

    @property
    def span(self) -> float:
        return FP4_MAX * _CALIBRATIONS[self.calibration]

    @property
    def largest_block_scale(self) -> float:
        return FP8_MAX

    @property
    def codes(self) -> str:
        return "weight_packed"

    def weight_specs(self, weight: TensorSpec, arithmetic: Arithmetic) -> dict[str, TensorSpec]:
        if len(weight.shape) != 2 or weight.shape[1] % BLOCK:
            raise ValueError(f"NVFP4 needs [out, in] with in divisible by {BLOCK}, not {list(weight.shape)}")
        rows, columns = weight.shape
        return {
            "weight_packed": TensorSpec((rows, columns // 2), torch.uint8),
            "weight_scale": TensorSpec((rows, columns // BLOCK), torch.float8_e4m3fn),
            _GLOBAL.tensor: TensorSpec((1,), torch.float32),
        }

    def measure(self, rows: Tensor, arithmetic: Arithmetic) -> Tensor:
        return nvfp4.tensor_amax([rows], arithmetic=arithmetic)

    def constants_of_stack(self, weight: TensorSpec, amax: StackAmax) -> dict[str, Tensor]:
        assert amax.weight is not None, "not measured"
        divisors = global_scales(
            amax.weight, arithmetic=amax.arithmetic, dtype=weight.dtype, largest=_CALIBRATIONS[self.calibration]
        )
        return {_GLOBAL.tensor: divisors[:, None], **super().constants_of_stack(weight, amax)}

    def quantize_rows(self, rows: Tensor, amax: GroupAmax, block_amax: BlockAmax | None = None) -> dict[str, Tensor]:
        assert amax.weight is not None, "not measured"
        if self.calibration in (LEARNED, LEARNED_UNROUNDED):
            if block_amax is None:
                raise ValueError("the learned amax of its blocks are missing")
            post, pre = block_amax.stored, block_amax.stored if block_amax.chosen is None else block_amax.chosen
            rounds = self.calibration == LEARNED
            quantized = nvfp4.quantize_learned(rows, amax.weight, post, pre, rounds_pre=rounds)
        else:
            quantized = nvfp4.quantize(
                rows,
                amax.weight,
                arithmetic=amax.arithmetic,
                block_amax=None if block_amax is None else block_amax.stored,
                largest=_CALIBRATIONS[self.calibration],
            )
        return {"weight_packed": quantized.packed, "weight_scale": quantized.block_scale}

    def quantize_stack(
        self,
        rows: Tensor,
        amax: StackAmax,
        block_amax: BlockAmax | None = None,
        into: Mapping[str, Tensor] = NO_TENSORS,
    ) -> dict[str, Tensor]:
        if self.calibration or block_amax is not None:
            return super().quantize_stack(rows, amax, block_amax, into)
        assert amax.weight is not None, "not measured"
        memory = (into["weight_packed"], into["weight_scale"].view(torch.uint8)) if into else None
        codes, scales, _ = nvfp4.quantize_stack(rows, amax.weight, arithmetic=amax.arithmetic, into=memory)
        return {"weight_packed": codes, "weight_scale": scales}

    def weight_shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
        packed = specs.get("weight_packed")
        return None if packed is None or len(packed.shape) != 2 else (packed.shape[0], packed.shape[1] * 2)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return nvfp4.dequantize(_stored(tensors), dtype)

    @property
    def levels(self) -> str:
        return "weight_scale"

    def energies(self, tensors: Mapping[str, Rows]) -> Tensor:
        packed, scales = ((rows for _, rows in tensors[name].parts()) for name in ("weight_packed", "weight_scale"))
        return energies_of_blocks(packed, scales)

    def restore(self, tensors: Mapping[str, Tensor], amax: Tensor | None = None) -> Tensor:
        amax = _GLOBAL.amax(tensors[_GLOBAL.tensor]) if amax is None else amax
        return restore_nvfp4(_stored(tensors), amax / torch.full_like(amax, SCALE_RANGE))


def _stored(tensors: Mapping[str, Tensor]) -> NVFP4Weight:
    return NVFP4Weight(tensors["weight_packed"], tensors["weight_scale"], tensors[_GLOBAL.tensor])


NVFP4 = NVFP4Scheme(
    "nvfp4",
    format="nvfp4",
    config_group={
        "format": "nvfp4-pack-quantized",
        "weights": WEIGHTS,
        "input_activations": {**WEIGHTS, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"},
    },
    weight_quantizer=BLOCKS_OF_E2M1,
    input_quantizer=BLOCKS_OF_E2M1,
    shard_multiple=WHOLE_BLOCKS,
)
