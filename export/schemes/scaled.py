"""FP8 and integer formats: codes times a scale for a tensor, a row, a group of columns or a square block.

One class; `fp8.py`, `fp8_dynamic.py`, `fp8_block.py`, `w4a16.py`, `w4a16_asym.py` and `w8a8.py` say what each is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.kernels import scaled
from amaxbridge.export.kernels.scaled import Blocks, Code, ScaledWeight
from amaxbridge.mappings.tensors import TensorSpec

_CODES_A_WORD = 8  # of 4 bits; zero points are packed along the rows


@dataclass(frozen=True)
class Scaled:
    """A format of codes and scales.

    Args:
        name: as users choose it.
        format: of the weight quantizers it is for; "" where ModelOpt has none.
        code: what a weight becomes; INT4 is packed, eight codes an int32.
        blocks: what shares a scale.
        config_group: its entry in config.json without targets.
        needs_input_amax: whether inputs have one static scale.
        group_sizes: the widths that users may choose in place of `blocks.width`; none where the format fixes it.
    """

    name: str
    format: str
    code: Code
    blocks: Blocks
    config_group: dict[str, Any]
    needs_input_amax: bool = False
    group_sizes: tuple[int, ...] = ()

    @property
    def needs_weight_amax(self) -> bool:
        return self.blocks.height is None  # one scale for the tensor

    @property
    def _symmetric(self) -> bool:
        return bool(self.config_group["weights"]["symmetric"])

    def output_specs(self, module: str, weight: TensorSpec, *, calibrated: bool) -> dict[str, TensorSpec]:
        width = self.blocks.width if self.blocks.height == 1 else None  # a square block may be cut short
        if len(weight.shape) != 2 or (width and weight.shape[1] % width):
            divisible = f" with in divisible by {width}" if width else ""
            raise ValueError(f"{self.name} needs [out, in]{divisible}, not {list(weight.shape)}{self._remedy(weight)}")
        rows, columns = weight.shape
        down, across = self.blocks.shape(rows, columns)
        shape = (1,) if self.needs_weight_amax else (down, across)
        scale = TensorSpec(shape, self._scale_dtype(weight.dtype, calibrated=calibrated))
        if self.code is not Code.INT4:
            specs = {"weight": TensorSpec((rows, columns), self.code.dtype), "weight_scale": scale}
        else:
            packed = TensorSpec((rows, math.ceil(columns / 8)), torch.int32)
            specs = {"weight_packed": packed, "weight_scale": scale, "weight_shape": TensorSpec((2,), torch.int64)}
        if not self._symmetric:
            specs["weight_zero_point"] = TensorSpec((math.ceil(rows / 8), across), torch.int32)
        if self.needs_input_amax:
            specs["input_scale"] = TensorSpec((1,), torch.float32)
        return {f"{module}.{name}": spec for name, spec in specs.items()}

    @property
    def row_step(self) -> int:
        packed_down = 1 if self._symmetric else _CODES_A_WORD
        return max(self.blocks.height or 1, packed_down)

    def measure(self, rows: Tensor, *, calibrated: bool) -> Tensor | None:
        return scaled.largest(rows, self.blocks).squeeze().float() if self.needs_weight_amax else None

    def constants(self, module: str, weight: TensorSpec, amax: GroupAmax) -> dict[str, Tensor]:
        constants = {}
        if self.needs_weight_amax:
            assert amax.weight is not None, f"{module}: not measured"
            constants["weight_scale"] = self._scale(amax.weight)
        if self.code is Code.INT4:
            constants["weight_shape"] = torch.tensor(weight.shape)
        if self.needs_input_amax:
            assert amax.input is not None, f"{module}: {self.name} needs an input amax"
            constants["input_scale"] = self._scale(amax.input)
        return {f"{module}.{name}": tensor for name, tensor in constants.items()}

    def quantize_rows(
        self, module: str, rows: Tensor, amax: GroupAmax, block_amax: Tensor | None = None
    ) -> dict[str, Tensor]:
        calibrated = self._calibrated(rows, amax, block_amax) if amax.calibrated else None
        quantized = scaled.quantize(rows, self.code, self.blocks, amax=calibrated, symmetric=self._symmetric)
        packed = self.code is Code.INT4
        tensors = {"weight_packed": scaled.pack_int4(quantized.codes)} if packed else {"weight": quantized.codes}
        if not self.needs_weight_amax:
            tensors["weight_scale"] = quantized.scale.to(self._scale_dtype(rows.dtype, calibrated=amax.calibrated))
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = scaled.pack_int4(quantized.zero_point.T).T.contiguous()
        return {f"{module}.{name}": tensor for name, tensor in tensors.items()}

    def dequantize(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = tensors[f"{module}.weight_scale"]
        scale = scale.reshape(1, 1) if self.needs_weight_amax else scale
        if self.code is not Code.INT4:
            return scaled.dequantize(ScaledWeight(tensors[f"{module}.weight"], scale), self.blocks)
        rows, columns = tensors[f"{module}.weight_shape"].tolist()
        zero_point = None
        if not self._symmetric:
            zero_point = scaled.unpack_int4(tensors[f"{module}.weight_zero_point"].T, rows).T
        codes = scaled.unpack_int4(tensors[f"{module}.weight_packed"], columns)
        return scaled.dequantize(ScaledWeight(codes, scale, zero_point), self.blocks)

    def _remedy(self, weight: TensorSpec) -> str:
        """The option with which a weight would fit, to end a message."""
        fitting = [size for size in self.group_sizes if len(weight.shape) == 2 and weight.shape[1] % size == 0]
        return f"; give scheme.group_size={max(fitting)}" if fitting else ""

    def _scale_dtype(self, weight: torch.dtype, *, calibrated: bool) -> torch.dtype:
        """Engines hold scales in fp32, but those of packed integers in the dtype of the model, whatever is stored."""
        return torch.float32 if calibrated and self.code is not Code.INT4 else weight

    def _calibrated(self, rows: Tensor, amax: GroupAmax, block_amax: Tensor | None) -> Tensor:
        """The amax of each block of some rows: of the block, of the tensor, or what the rows say."""
        shape = self.blocks.shape(*rows.shape)
        if block_amax is not None:
            return block_amax.reshape(shape)
        if amax.weight is not None:
            return amax.weight.expand(shape)
        return scaled.largest(rows, self.blocks)

    def _scale(self, amax: Tensor) -> Tensor:
        """fp32 `[1]`."""
        bound = torch.full_like(amax, self.code.bound, dtype=torch.float32)
        return (scaled.usable(amax.float(), bound) / bound).reshape(1)
