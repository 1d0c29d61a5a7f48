"""Parameters that hold codes and scales: the interface of Transformer Engine's tensors, where that cannot run.

Attributes, shapes and padding as in transformer_engine.pytorch.tensor 2.20.2: the storages of Float8BlockwiseQTensor,
MXFP8Tensor and Float8Tensor, and `get_scale_shape` of their quantizers. Real ones are tried in `tests/gpu/te`.
"""

from enum import Enum
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK, MX_BLOCK = 128, 32


class DType(Enum):
    kFloat8E4M3 = 7  # Transformer Engine's spelling
    kFloat8E5M2 = 8


class _Stored(torch.Tensor):
    """Has a weight's shape and bf16 as its dtype. Allows what training and export may do with it, and no more."""

    _quantizer: object = None
    _fp8_dtype = DType.kFloat8E4M3

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.bfloat16, device=weight.device)
        made._quantize(weight.detach())
        return made

    def _quantize(self, weight: Tensor) -> None:
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            made = torch.Tensor._make_wrapper_subclass(cls, args[0].shape, dtype=torch.bfloat16, device=args[0].device)
            made.__dict__.update(args[0].__dict__)
            return made
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0]._quantize(args[1])
            return args[0]
        raise NotImplementedError(f"{func} of a tensor that is codes and scales")


class InBlocks(_Stored):
    """Like `Float8BlockwiseQTensor` in square blocks: scales `[out/128, in/128]`, padded to a multiple of 4 across."""

    _is_2D_scaled = True

    def _quantize(self, weight: Tensor) -> None:
        codes, scales = quantize_in_blocks(weight)
        self._rowwise_data = codes.view(torch.uint8)
        self._rowwise_scale_inv = pad(scales, (0, -scales.shape[1] % 4), value=7.0)

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        scales = self._rowwise_scale_inv.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return (self._rowwise_data.view(torch.float8_e4m3fn).float() * scales).bfloat16()


class InRows(InBlocks):
    """Like `InBlocks`, with a scale for 128 elements of a row, as activations have."""

    _is_2D_scaled = False


class MX(_Stored):
    """Like `MXFP8Tensor`: exponents `[out, in/32]`, padded to multiples of 128 and 4."""

    _with_gemm_swizzled_scales = False

    def _quantize(self, weight: Tensor) -> None:
        codes, exponents = quantize_mx(weight)
        self._rowwise_data = codes.view(torch.uint8)
        rows, columns = exponents.shape
        self._rowwise_scale_inv = pad(exponents, (0, -columns % 4, 0, -rows % 128), value=9)

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        steps = torch.exp2(self._rowwise_scale_inv[:rows, : columns // MX_BLOCK].float() - 127)
        return (self._rowwise_data.view(torch.float8_e4m3fn).float() * steps.repeat_interleave(MX_BLOCK, 1)).bfloat16()


class Swizzled(MX):
    """Like `MX`, with the scales in the order that a kernel reads."""

    _with_gemm_swizzled_scales = True


class OneScale(_Stored):
    """Like `Float8Tensor`: one scale."""

    def _quantize(self, weight: Tensor) -> None:
        self._scale_inv = weight.abs().max().float() / 448
        self._data = (weight.float() / self._scale_inv).to(torch.float8_e4m3fn).view(torch.uint8)

    def dequantize(self) -> Tensor:
        return (self._data.view(torch.float8_e4m3fn).float() * self._scale_inv).bfloat16()


class Gradients(InBlocks):
    """Like `InBlocks`, in the format of gradients."""

    _fp8_dtype = DType.kFloat8E5M2


def quantize_in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight. No scale is a power of two, so that a wrong one shows."""
    rows, columns = weight.shape
    padded = pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.contiguous().to(torch.float8_e4m3fn), scales


def quantize_mx(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and exponents."""
    tiles = weight.float().unflatten(1, (-1, MX_BLOCK))
    exponents = (tiles.abs().amax(2) / 448).log2().ceil().clamp(-127, 127)
    codes = (tiles / torch.exp2(exponents)[:, :, None]).flatten(1)
    return codes.to(torch.float8_e4m3fn), (exponents + 127).to(torch.uint8)
