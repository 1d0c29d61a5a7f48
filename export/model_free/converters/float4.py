"""FP4 codes (E2M1), two a byte, the even column in the low nibble.

    who             codes                       scales
    ModelOpt NVFP4  weight uint8 [out, in/2]    weight_scale E4M3 [out, in/16], weight_scale_2 fp32: multipliers
    ModelOpt MXFP4  weight uint8 [out, in/2]    weight_scale uint8 [out, in/32]: exponents plus 127
    GPT-OSS         blocks uint8 [out, in/32, 16]   scales uint8 [out, in/32]: likewise

MXFP4 becomes NVFP4 without loss of value: each block of 32 becomes two of 16 whose E4M3 scale is a power of two. E4M3
has those from 2^-9 to 2^8, so the exponents of a weight, apart from blocks of zeros, may span 18 powers and no more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1, mx
from amaxbridge.export.model_free.converters.stored_weight import (
    INPUT_SCALES,
    Local,
    StoredWeight,
    numbers_of,
    one_number,
)
from amaxbridge.export.schemes import Scheme
from amaxbridge.export.schemes.signature import Arguments
from amaxbridge.mappings.tensors import TensorSpec

_NVFP4, _MXFP4 = 16, 32  # columns of a block
_NVFP4_WEIGHTS = Arguments(4, "float", "tensor_group", group_size=_NVFP4)
_MXFP4_WEIGHTS = Arguments(4, "float", "group", group_size=_MXFP4)
_LEAST, _MOST = -9, 8  # the powers of two in E4M3
_BIAS = 127
NO_TENSORS: Local = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class NVFP4Weight(StoredWeight):
    """ModelOpt's NVFP4: blocks of 16 under E4M3 scales, and these under a multiplier.

    Args:
        folded: local name of the factors of the inputs that the weight takes, if any.
    """

    folded: str | None = None

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        step = tensors["weight_scale"].float() * tensors["weight_scale_2"].float()
        codes = e2m1.unpack(tensors["weight"]).unflatten(1, (-1, _NVFP4))
        weight: Tensor = (codes * step.unsqueeze(-1)).flatten(1)
        if self.folded is not None:
            weight = weight * tensors[self.folded].float()
        return weight.to(dtype)

    def holds(self, scheme: Scheme) -> bool:
        if self.folded or scheme.signature.weights != _NVFP4_WEIGHTS:
            return False
        return scheme.input_scale is None or "input_scale" in self.beside

    def kept(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        made = {
            "weight_packed": tensors["weight"],
            "weight_scale": tensors["weight_scale"],
            "weight_global_scale": 1 / one_number(tensors["weight_scale_2"]),
        }
        if scheme.input_scale is not None:
            made[scheme.input_scale.tensor] = 1 / one_number(tensors["input_scale"])
        return made

    def kept_as(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        made = StoredWeight.kept_as(self, tensors, scheme)
        if scheme.plain is not scheme:  # the same multipliers: the reciprocal of a reciprocal may be another number
            shared = made.keys() & {"weight_scale_2", "input_scale"}
            made |= {name: tensors[name].float().reshape(()) for name in shared}
        return made


@dataclass(frozen=True, slots=True)
class MXFP4Weight(StoredWeight):
    """Blocks of 32 under powers of two.

    Args:
        local: its stored tensors.
        exponents: the least and the greatest stored exponent, in its fused group, of blocks that are not all zeros. All
            there are, as long as no scheme asks: reading them takes time.
    """

    local: Local = NO_TENSORS
    exponents: tuple[int, int] = (0, 255)

    @property
    def outputs_first(self) -> bool:
        return True

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = self._stored(tensors)
        return mx.dequantize(e2m1.unpack(codes), scales, dtype)

    def in_group(self, group: Sequence[StoredWeight], scheme: Scheme) -> "MXFP4Weight":
        if scheme.signature.weights != _NVFP4_WEIGHTS:
            return self
        found = [_exponents(each.local, *each.tensors) for each in group if isinstance(each, MXFP4Weight)]
        return replace(self, exponents=(min(least for least, _ in found), max(greatest for _, greatest in found)))

    def holds(self, scheme: Scheme) -> bool:
        weights = scheme.signature.weights
        if weights == _MXFP4_WEIGHTS and scheme.input_scale is None:
            return True
        return weights == _NVFP4_WEIGHTS and scheme.input_scale is None and self.hindrance(scheme) is None

    def hindrance(self, scheme: Scheme) -> str | None:
        least, greatest = self.exponents
        fits = greatest - least <= _MOST - _LEAST and greatest >= _MOST  # below, the divisor is beyond fp32
        if fits or scheme.signature.weights != _NVFP4_WEIGHTS:
            return None
        return f"its blocks are in powers of two from {least - _BIAS} to {greatest - _BIAS}, more than E4M3 scales span"

    def kept(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        codes, scales = self._stored(tensors)
        if scheme.signature.weights == _MXFP4_WEIGHTS:
            return {"weight_packed": codes, "weight_scale": scales}
        top = self.exponents[1] - _MOST  # the stored exponent of the unit of block scales
        powers = (scales.int() - top).clamp(_LEAST, _MOST)  # out of range: blocks of zeros
        steps = mx.power_of_two((powers + _BIAS).to(torch.uint8)).to(torch.float8_e4m3fn)
        blocks = steps.repeat_interleave(_MXFP4 // _NVFP4, 1)
        divisor = torch.tensor([2.0 ** (_BIAS - top)])
        return {"weight_packed": codes, "weight_scale": blocks, "weight_global_scale": divisor}

    def _stored(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes `[out, in/2]` and exponents `[out, in/32]`."""
        codes, scales = (tensors[name] for name in self.tensors)
        return codes.flatten(1), scales.view(torch.uint8)


def nvfp4_weight(local: Local) -> NVFP4Weight | None:
    """A module in ModelOpt's NVFP4; None if it is none.

    Raises:
        ValueError: its tensors do not fit one another.
    """
    codes, scale = local.get("weight"), local.get("weight_scale")
    if codes is None or scale is None or "weight_scale_2" not in local or codes.spec.dtype != torch.uint8:
        return None
    if len(codes.spec.shape) != 2:
        raise ValueError(f"weight is {codes.spec}: only FP4 codes [out, in/2] are read")
    rows, columns = codes.spec.shape[0], codes.spec.shape[1] * 2
    if scale.spec != TensorSpec((rows, columns // _NVFP4), torch.float8_e4m3fn):
        raise ValueError(f"weight_scale is {scale.spec}, and FP4 codes are {codes.spec}")
    folded = "pre_quant_scale" if "pre_quant_scale" in local else None
    names = ("weight", "weight_scale", "weight_scale_2", *([folded] if folded else []))
    beside = tuple(name for name in INPUT_SCALES if name in local)
    shared = numbers_of(local, "weight_scale_2", "input_scale")
    if "weight_scale_2" not in dict(shared):
        raise ValueError(f"weight_scale_2 is {local['weight_scale_2'].spec}, not one number")
    return NVFP4Weight((rows, columns), names, beside, shared, folded)


def mxfp4_weight(local: Local, codes_name: str, scales_name: str) -> MXFP4Weight | None:
    """A module in MXFP4 under these names; None if it is none.

    Raises:
        ValueError: its tensors do not fit one another.
    """
    codes, scales = local.get(codes_name), local.get(scales_name)
    if codes is None or scales is None or codes.spec.dtype != torch.uint8:
        return None
    if scales.spec.dtype not in (torch.uint8, torch.float8_e8m0fnu) or len(scales.spec.shape) != 2:
        return None
    rows, columns = scales.spec.shape[0], scales.spec.shape[1] * _MXFP4
    if codes.spec.shape not in ((rows, columns // 2), (rows, columns // _MXFP4, _MXFP4 // 2)):
        raise ValueError(f"{codes_name} is {codes.spec}, and {scales_name} {scales.spec}")
    beside = tuple(name for name in INPUT_SCALES if name in local)
    return MXFP4Weight((rows, columns), (codes_name, scales_name), beside, (), local)


def _exponents(local: Local, codes_name: str, scales_name: str) -> tuple[int, int]:
    """The least and the greatest exponent. Where they span too much, blocks of zeros are not counted."""
    stored = local[scales_name].read().view(torch.uint8)
    if not stored.numel():
        return _BIAS, _BIAS
    least, greatest = (int(each) for each in stored.aminmax())
    if greatest - least > _MOST - _LEAST:
        codes = local[codes_name].read().reshape(*stored.shape, -1)
        used = stored[(codes & 0x77 != 0).any(-1)]
        least, greatest = (int(each) for each in used.aminmax()) if used.numel() else (_BIAS, _BIAS)
    return least, greatest
