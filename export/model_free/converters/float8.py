"""FP8 codes (E4M3) times scales, as several programs name them: `weight = code * scale`.

who                                 codes    scale
DeepSeek-V3, transformers' fp8      weight   weight_scale_inv   fp32 or E8M0 [⌈out/128⌉, ⌈in/128⌉]: a multiplier, too
DeepSeek-V3.2, V4                   weight   scale              E8M0
Mistral                             weight   weight_scale_inv   one number
ModelOpt FP8                        weight   weight_scale       fp32, one number
ModelOpt FP8_PER_CHANNEL_PER_TOKEN  weight   weight_scale       fp32 [out]
ModelOpt FP8_PB_WO                  weight   weight_scale       fp32 [out/128, 1, in/128, 1]
ModelOpt MXFP8                      weight   weight_scale       E8M0 as uint8 [out, in/32]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amaxbridge.export.kernels import mx
from amaxbridge.export.kernels.scaled import Blocks, ScaledWeight, dequantize
from amaxbridge.export.model_free.converters.stored_weight import (
    INPUT_SCALES,
    Local,
    StoredWeight,
    numbers_of,
    one_number,
)
from amaxbridge.export.schemes import Scheme
from amaxbridge.mappings.tensors import TensorSpec

_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_MX_BLOCK = 32
PER_ROW = Blocks()


@dataclass(frozen=True, slots=True)
class Float8Weight(StoredWeight):
    """E4M3 codes and multipliers.

    Args:
        blocks: the block that shares a scale.
        exponents: True if scales are powers of two, stored as their exponents.
        folded: local name of the factors of the inputs that the weight takes, if any.
        group_scale: the largest scale of its fused group, if the members differ: codes are rounded to it, as vLLM does
            when it loads such a group.
    """

    blocks: Blocks = PER_ROW
    exponents: bool = False
    folded: str | None = None
    group_scale: float | None = None

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = tensors["weight"], self._scale(tensors)
        weight = dequantize(ScaledWeight(codes, scale), self.blocks, torch.float32 if self.folded else dtype)
        return weight if self.folded is None else (weight * tensors[self.folded].float()).to(dtype)

    def in_group(self, group: Sequence[StoredWeight], scheme: Scheme) -> "Float8Weight":
        scales = [
            dict(each.shared)[each.tensors[1]] for each in group if isinstance(each, Float8Weight) and each.is_whole
        ]
        if scheme.group_scale is None or len(scales) < len(group) or len(set(scales)) == 1:
            return self
        shared = tuple((name, max(scales) if name == self.tensors[1] else value) for name, value in self.shared)
        return replace(self, shared=shared, group_scale=max(scales))

    @property
    def is_whole(self) -> bool:
        """True if the whole weight has one scale."""
        return self.blocks == Blocks(None, None)

    @property
    def note(self) -> str | None:
        return None if self.group_scale is None else "its codes are rounded to the largest scale of its fused group"

    def holds(self, scheme: Scheme) -> bool:
        weights = scheme.signature.weights
        if self.folded or (weights.bits, weights.kind) != (8, "float") or scheme.blocks != self.blocks:
            return False
        if self._scale_spec(scheme).dtype == torch.uint8 and not self.exponents:
            return False
        return scheme.input_scale is None or any(name in self.beside for name in INPUT_SCALES[:2])

    def kept(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        spec, scale = self._scale_spec(scheme), self._scale(tensors)
        if spec.dtype == torch.uint8:
            scale = tensors[self.tensors[1]].view(torch.uint8)
        codes = tensors["weight"]
        if self.group_scale is not None:
            shared = torch.full_like(scale, self.group_scale)
            codes = (codes.float() * scale / shared).clamp(-448, 448).to(codes.dtype)
            scale = shared
        made = {"weight": codes, "weight_scale": scale.reshape(spec.shape)}
        if scheme.input_scale is not None:
            name = next(name for name in INPUT_SCALES if name in tensors)
            made[scheme.input_scale.tensor] = one_number(tensors[name])
        return made

    def _scale_spec(self, scheme: Scheme) -> TensorSpec:
        return self.specs(scheme)["weight_scale"]

    def _scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = tensors[self.tensors[1]]
        numbers = mx.power_of_two(scale) if scale.dtype == torch.uint8 else scale.float()
        return numbers.reshape(self.blocks.shape(*self.shape))


def float8_weight(local: Local, scale_names: Sequence[str], block: Sequence[int] | None = None) -> Float8Weight | None:
    """A module with FP8 codes and one of these scales; None if it is none.

    Args:
        local: its tensors.
        scale_names: names that its scale may have.
        block: rows and columns of a block as the source says; None if it does not.

    Raises:
        ValueError: the scales do not fit the codes, or their blocks are not known.
    """
    codes, name = local.get("weight"), next((name for name in scale_names if name in local), None)
    if codes is None or name is None or codes.spec.dtype != torch.float8_e4m3fn:
        return None
    if len(codes.spec.shape) != 2:
        raise ValueError(f"weight is {codes.spec}: only FP8 codes [out, in] are read")
    rows, columns = codes.spec.shape
    folded = "pre_quant_scale" if "pre_quant_scale" in local else None
    if folded and local[folded].spec.shape != (columns,):
        raise ValueError(f"pre_quant_scale is {local[folded].spec}, and the weight {codes.spec}")
    return Float8Weight(
        (rows, columns),
        ("weight", name, *([folded] if folded else [])),
        tuple(each for each in INPUT_SCALES if each in local),
        numbers_of(local, name, *INPUT_SCALES),
        _blocks((rows, columns), local[name].spec, block),
        local[name].spec.dtype in _EXPONENTS,
        folded,
    )


def _blocks(shape: tuple[int, int], scale: TensorSpec, block: Sequence[int] | None) -> Blocks:
    """The block that shares a scale, from the shapes of codes and scales."""
    rows, columns = shape
    if scale.dtype in _EXPONENTS and columns % _MX_BLOCK == 0 and scale.shape == (rows, columns // _MX_BLOCK):
        return Blocks(width=_MX_BLOCK)
    if scale.dtype not in _SCALES:
        raise ValueError(f"its scale is {scale}, no number")
    if scale.shape in ((), (1,)):
        return Blocks(None, None)
    if scale.shape in ((rows,), (rows, 1)) and block is None:
        return Blocks()
    grid = scale.shape[::2] if len(scale.shape) == 4 and scale.shape[1] == scale.shape[3] == 1 else scale.shape
    if len(grid) == 2:
        side = _side(shape, grid) if block is None else None
        height, width = block if block is not None else (side or 0, side or 0)
        if height and _fits(shape, grid, (height, width)):
            return Blocks(height, width)
    said = f" in blocks of {list(block)}" if block is not None else ""
    raise ValueError(f"its scale is {scale}, which does not fit codes {list(shape)}{said}")


def _fits(shape: tuple[int, int], grid: Sequence[int], block: Sequence[int]) -> bool:
    return tuple(grid) == (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))


def _side(shape: tuple[int, int], grid: Sequence[int]) -> int | None:
    """The side of square blocks: 128, which everybody uses, or the only other one that fits."""
    fitting = [side for side in (128, 64, 32, 256) if _fits(shape, grid, (side, side))]
    return fitting[0] if fitting and (fitting[0] == 128 or len(fitting) == 1) else None
