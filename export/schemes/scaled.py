"""FP8 and integer formats: codes times a scale for a tensor, a row, a group of columns or a square block.

One class; the files beside it declare the formats. Integers under `pack-quantized` are packed into int32 words, as many
codes as fit, the first in the low bits, and `weight_shape` holds the weight's shape.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax, StackAmax
from amaxbridge.export.disk.row_chunks import Rows
from amaxbridge.export.kernels import scaled
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.common_scale import energies_of_codes
from amaxbridge.export.kernels.scaled import Blocks, Code, ScaledWeight
from amaxbridge.export.schemes.scheme import NO_TENSORS, UE8M0, Scheme
from amaxbridge.mappings.tensors import TensorSpec

_WORD = 32  # bits


@dataclass(frozen=True, kw_only=True)
class Scaled(Scheme):
    """A format of codes and scales.

    Args:
        code: the type of the codes.
        share: the block that shares a scale.
        sized: makes the scheme for groups of another size, -1 for whole rows; None if the size is part of the format.
    """

    code: Code
    share: Blocks
    sized: "Callable[[int], Scaled] | None" = None

    @property
    def blocks(self) -> Blocks:
        return self.share

    @property
    def group_scale(self) -> SharedScale | None:
        return SharedScale("weight_scale", self.code.bound) if self.share == Blocks(None, None) else None

    @property
    def block_bound(self) -> float:
        return self.code.bound

    @property
    def has_free_row_scales(self) -> bool:
        return self.share.height == 1

    @property
    def codes(self) -> str:
        return "weight_packed" if self._is_packed else "weight"

    @property
    def row_step(self) -> int:
        packed_down = 1 if self._is_symmetric else self._codes_a_word
        return max(self.share.height or 1, packed_down)

    def with_group_size(self, group_size: int) -> "Scaled | None":
        return None if self.sized is None else self.sized(group_size)

    def with_scales(self, scales: str) -> "Scaled | None":
        return replace(self, scales=scales) if self.code is Code.E4M3 and self.share.height not in (None, 1) else None

    @property
    def _is_packed(self) -> bool:
        return bool(self.config_group["format"] == "pack-quantized")

    @property
    def scales_in_model_dtype(self) -> bool:
        return self._is_packed

    @property
    def _is_symmetric(self) -> bool:
        return bool(self.config_group["weights"]["symmetric"])

    @property
    def _codes_a_word(self) -> int:
        """Codes in one word; zero points are packed along the rows."""
        return _WORD // self.bits

    def weight_specs(self, weight: TensorSpec, arithmetic: Arithmetic) -> dict[str, TensorSpec]:
        width = self.share.width if self.share.height == 1 else None  # a square block may be smaller at the edge
        if len(weight.shape) != 2 or (width and weight.shape[1] % width):
            divisible = f" with in divisible by {width}" if width else ""
            raise ValueError(f"{self.name} needs [out, in]{divisible}, not {list(weight.shape)}{self._remedy(weight)}")
        rows, columns = weight.shape
        down, across = self.share.shape(rows, columns)
        shape = (1,) if self.group_scale else (down, across)
        scale = TensorSpec(shape, self._scale_dtype(weight.dtype, arithmetic))
        if not self._is_packed:
            specs = {"weight": TensorSpec((rows, columns), self.code.dtype), "weight_scale": scale}
        else:
            packed = TensorSpec((rows, math.ceil(columns / self._codes_a_word)), torch.int32)
            specs = {"weight_packed": packed, "weight_scale": scale, "weight_shape": TensorSpec((2,), torch.int64)}
        if not self._is_symmetric:
            specs["weight_zero_point"] = TensorSpec((math.ceil(rows / self._codes_a_word), across), torch.int32)
        return specs

    def measure(self, rows: Tensor, arithmetic: Arithmetic) -> Tensor | None:
        return scaled.largest(rows, self.share).squeeze().float() if self.group_scale else None

    def constants_of_stack(self, weight: TensorSpec, amax: StackAmax) -> dict[str, Tensor]:
        constants = {}
        if self.group_scale is not None:
            assert amax.weight is not None, "not measured"
            constants[self.group_scale.tensor] = self.group_scale.stored_of_groups(amax.weight)
        if self._is_packed:
            constants["weight_shape"] = torch.tensor(weight.shape).expand(amax.length, -1)
        return {**constants, **super().constants_of_stack(weight, amax)}

    def quantize_rows(self, rows: Tensor, amax: GroupAmax, block_amax: BlockAmax | None = None) -> dict[str, Tensor]:
        calibrated = None
        if amax.arithmetic is Arithmetic.MODELOPT or self.scales:
            calibrated = self._rounded(self._amax_of_blocks(rows, amax, block_amax))
        quantized = scaled.quantize(rows, self.code, self.share, amax=calibrated, symmetric=self._is_symmetric)
        codes = scaled.pack_codes(quantized.codes, self.bits) if self._is_packed else quantized.codes
        tensors = {self.codes: codes}
        if self.group_scale is None:
            scale = quantized.scale
            if block_amax is not None and block_amax.chosen is not None:
                stored = self._rounded(block_amax.stored.reshape(scale.shape).to(scale.device))
                scale = scaled.scale_of(stored, self.code)
            tensors["weight_scale"] = scale.to(self._scale_dtype(rows.dtype, amax.arithmetic))
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = scaled.pack_codes(quantized.zero_point.T, self.bits).T.contiguous()
        return tensors

    def quantize_stack(
        self,
        rows: Tensor,
        amax: StackAmax,
        block_amax: BlockAmax | None = None,
        into: Mapping[str, Tensor] = NO_TENSORS,
    ) -> dict[str, Tensor]:
        each = len(rows) // amax.length
        if self.group_scale is None and amax.weight is None and each % self.row_step == 0:  # no block knows of another
            return self.quantize_rows(rows, GroupAmax(None, None, amax.arithmetic), block_amax)
        calibrated = block_amax is None and amax.arithmetic is Arithmetic.MODELOPT
        if self.group_scale is None or self._is_packed or not calibrated or amax.weight is None:
            return super().quantize_stack(rows, amax, block_amax, into)
        quantized = scaled.quantize(rows, self.code, Blocks(each, None), amax=amax.weight[:, None])
        return {self.codes: quantized.codes}

    @property
    def levels(self) -> str | None:
        return "weight" if self.group_scale is not None and self.code is Code.E4M3 else None

    def energies(self, tensors: Mapping[str, Rows]) -> Tensor:
        return energies_of_codes(rows for _, rows in tensors["weight"].parts())

    def weight_shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
        codes = specs.get(self.codes)
        if codes is None or len(codes.shape) != 2:
            return None
        return codes.shape[0], codes.shape[1] * (self._codes_a_word if self._is_packed else 1)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        scale = tensors["weight_scale"]
        scale = scale.reshape(1, 1) if self.group_scale else scale
        if not self._is_packed:
            return scaled.dequantize(ScaledWeight(tensors["weight"], scale), self.share, dtype)
        rows, columns = tensors["weight_shape"].tolist()
        zero_point = None
        if not self._is_symmetric:
            zero_point = scaled.unpack_codes(tensors["weight_zero_point"].T, rows, self.bits).T
        codes = scaled.unpack_codes(tensors["weight_packed"], columns, self.bits)
        return scaled.dequantize(ScaledWeight(codes, scale, zero_point), self.share, dtype)

    def _remedy(self, weight: TensorSpec) -> str:
        """The end of a message: the option with which the weight would fit."""
        fitting = [size for size in self.group_sizes if len(weight.shape) == 2 and weight.shape[1] % size == 0]
        return f"; give scheme.group_size={max(fitting)}" if fitting else ""

    def _scale_dtype(self, weight: torch.dtype, arithmetic: Arithmetic) -> torch.dtype:
        """Engines hold scales in fp32, but scales of packed integers in the model's dtype, whatever is stored."""
        return torch.float32 if arithmetic is Arithmetic.MODELOPT and not self._is_packed else weight

    def _rounded(self, amax: Tensor) -> Tensor:
        """The amax that make the scales which are asked for."""
        return scaled.amax_of_power_of_two(amax, self.code) if self.scales == UE8M0 else amax

    def _amax_of_blocks(self, rows: Tensor, amax: GroupAmax, block_amax: BlockAmax | None) -> Tensor:
        """The amax of each block of some rows, for their codes: given for the block or the tensor, or measured."""
        shape = self.share.shape(*rows.shape)
        if block_amax is not None:
            return (block_amax.stored if block_amax.chosen is None else block_amax.chosen).reshape(shape)
        if amax.weight is not None:
            return amax.weight.expand(shape)
        return scaled.largest(rows, self.share)
