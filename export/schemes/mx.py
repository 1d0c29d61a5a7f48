"""The MX formats: small floats in blocks of 32 columns under a power of two. `mxfp4.py` and `mxfp8.py` name them.

Nothing is calibrated: scales come from the weights, and engines scale activations, also in blocks, at run time.
    `scale_dtype`
tells compressed-tensors that scales are powers of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax, StackAmax
from amaxbridge.export.kernels import e2m1, mx
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.mx import BLOCK
from amaxbridge.export.kernels.restore import restore_mx
from amaxbridge.export.kernels.scaled import Blocks
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.scheme import NO_TENSORS, Scheme, ShardMultiple, arguments
from amaxbridge.mappings.tensors import TensorSpec

_NAN = 255  # in E8M0


@dataclass(frozen=True)
class MXScheme(Scheme):
    """Blocks of E2M1 or E4M3 under powers of two."""

    @property
    def blocks(self) -> Blocks:
        return Blocks(width=BLOCK)

    @property
    def codes(self) -> str:
        return "weight_packed" if self.bits == 4 else "weight"

    def weight_specs(self, weight: TensorSpec, arithmetic: Arithmetic) -> dict[str, TensorSpec]:
        if len(weight.shape) != 2 or weight.shape[1] % BLOCK:
            raise ValueError(f"{self.name} needs [out, in] with in divisible by {BLOCK}, not {list(weight.shape)}")
        rows, columns = weight.shape
        codes = TensorSpec((rows, columns), torch.float8_e4m3fn)
        if self.bits == 4:
            codes = TensorSpec((rows, columns // 2), torch.uint8)
        return {self.codes: codes, "weight_scale": TensorSpec((rows, columns // BLOCK), torch.uint8)}

    def quantize_rows(self, rows: Tensor, amax: GroupAmax, block_amax: BlockAmax | None = None) -> dict[str, Tensor]:
        quantize = mx.quantize_mxfp4 if self.bits == 4 else mx.quantize_mxfp8
        codes, exponents = quantize(rows, amax.arithmetic)
        return {self.codes: codes, "weight_scale": exponents}

    def quantize_stack(
        self,
        rows: Tensor,
        amax: StackAmax,
        block_amax: BlockAmax | None = None,
        into: Mapping[str, Tensor] = NO_TENSORS,
    ) -> dict[str, Tensor]:
        return self.quantize_rows(rows, GroupAmax(None, None, amax.arithmetic))  # no block knows of another

    def weight_shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
        codes = specs.get(self.codes)
        if codes is None or len(codes.shape) != 2:
            return None
        return codes.shape[0], codes.shape[1] * (8 // self.bits)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        codes = tensors[self.codes]
        return mx.dequantize(e2m1.unpack(codes) if self.bits == 4 else codes, tensors["weight_scale"], dtype)

    def restore(self, tensors: Mapping[str, Tensor], amax: Tensor | None = None) -> Tensor:
        return restore_mx(self.dequantize(tensors), tensors["weight_scale"], 6.0 if self.bits == 4 else 448.0)

    def fault_of_scales(self, least: float, greatest: float) -> str | None:
        return "holds the byte 255, NaN in E8M0" if greatest >= _NAN else None


def mx_scheme(name: str, bits: int, disk_format: str, quantizer: QuantizerSettings, *, weights_only: bool) -> MXScheme:
    """A scheme with weights, and inputs unless `weights_only`, in MX blocks of one kind."""
    blocks: dict[str, Any] = arguments(bits, "float", "group", group_size=BLOCK, scale_dtype="torch.uint8")
    inputs = None if weights_only else {**blocks, "dynamic": True}
    return MXScheme(
        name,
        format=f"mxfp{bits}",
        config_group={"format": disk_format, "weights": blocks, "input_activations": inputs},
        weight_quantizer=quantizer,
        input_quantizer=None if weights_only else quantizer,
        shard_multiple=ShardMultiple(inputs=BLOCK),
    )


def mx_quantizer(num_bits: tuple[int, int]) -> QuantizerSettings:
    """ModelOpt's quantizer for MX blocks of floats with these bits."""
    return QuantizerSettings(num_bits, block_sizes={-1: BLOCK, "type": "dynamic", "scale_bits": (8, 0)})
