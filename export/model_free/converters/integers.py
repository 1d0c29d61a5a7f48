"""Integer codes of other programs: AutoAWQ, GPTQ, ModelOpt's INT4 and INT8.

    who            codes                             zero points                    scales
    AWQ (gemm)     qweight int32 [in, out/8]         qzeros int32 [in/g, out/8]     scales [in/g, out]
    GPTQ           qweight int32 [in/c, out]         qzeros int32 [in/g, out/c]     scales [in/g, out], g_idx int32 [in]
    ModelOpt INT4  weight uint8 [out/2, in]          none                           weight_scale [out, in/g]
    ModelOpt INT8  weight int8 [out, in]             none                           weight_scale [out]

c codes fill a word. AWQ stores the eight of a word in the order 0, 2, 4, 6, 1, 3, 5, 7. GPTQ's first version stores
zero points less one; `g_idx` names the group of each column, which is not in order where columns were sorted
(`desc_act`). ModelOpt packs two rows a byte, the even one in the low nibble, in two's complement.

    weight = (code - zero point) * scale
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.export.kernels import scaled
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.model_free.converters.stored_weight import INPUT_SCALES, Local, StoredWeight, numbers_of
from amaxbridge.export.schemes import Scheme
from amaxbridge.mappings.tensors import TensorSpec

_WORD = 32  # bits
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the code of each column lies in a word
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class IntegerWeight(StoredWeight):
    """Integer codes in groups of columns.

    Args:
        bits: bits of a code.
        group_size: columns that share a scale; None for whole rows.
        scale_dtype: dtype of the scales.
        symmetric: True if every zero point is the middle of the range.
        in_order: True if the groups are consecutive columns.
        layout: how codes and zero points are packed.
    """

    bits: int = 4
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float16
    symmetric: bool = False
    in_order: bool = True
    layout: "Layout | None" = None

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        assert self.layout is not None
        codes, scale, zero, group = self.layout.unpacked(self, tensors)
        if group is None:
            width = self.group_size or self.shape[1]
            group = torch.arange(self.shape[1], device=codes.device) // width
        weight = codes.float() if zero is None else codes.float() - zero.float()[:, group]
        weight = weight * scale.float()[:, group]
        factors = tensors.get("pre_quant_scale")
        return (weight if factors is None else weight * factors.float()).to(dtype)

    def holds(self, scheme: Scheme) -> bool:
        weights = scheme.signature.weights
        like = (self.bits, "int", self.symmetric, self.group_size)
        if (
            weights.bits,
            weights.kind,
            weights.symmetric,
            weights.group_size,
        ) != like or scheme.input_scale is not None:
            return False
        return self.in_order and "pre_quant_scale" not in self.tensors and self._fits(scheme)

    def specs(self, scheme: Scheme) -> dict[str, TensorSpec]:
        return scheme.tensor_specs(TensorSpec(self.shape, self.scale_dtype), Arithmetic.MODELOPT)

    def kept(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        assert self.layout is not None
        codes, scale, zero, _ = self.layout.unpacked(self, tensors)
        if scheme.codes == "weight":
            return {"weight": codes.to(torch.int8), "weight_scale": scale.float()}
        made = {
            "weight_packed": scaled.pack_codes(codes.to(torch.int8), self.bits),
            "weight_scale": scale.contiguous(),
            "weight_shape": torch.tensor(self.shape),
        }
        if zero is not None and not self.symmetric:
            made["weight_zero_point"] = scaled.pack_codes(zero.to(torch.int8).T, self.bits).T.contiguous()
        return made

    def _fits(self, scheme: Scheme) -> bool:
        try:
            self.specs(scheme)
        except ValueError:
            return False
        return True


class Layout:
    """How codes and zero points are packed."""

    def unpacked(
        self, weight: IntegerWeight, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes `[out, in]` and zero points `[out, groups]`, signed; scales `[out, groups]`; the group of each column.

        None in place of zero points and groups if there are none, and if groups are in order.
        """
        raise NotImplementedError


class AWQ(Layout):
    """AutoAWQ's `gemm`."""

    def unpacked(
        self, weight: IntegerWeight, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        codes = _awq(tensors["qweight"]).T
        zero = _awq(tensors["qzeros"]).T if "qzeros" in weight.tensors else None
        return codes.contiguous(), tensors["scales"].T, zero, None


@dataclass(frozen=True, slots=True)
class GPTQ(Layout):
    """GPTQ's.

    Args:
        less_one: True if zero points are stored less one.
    """

    less_one: bool = True

    def unpacked(
        self, weight: IntegerWeight, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        middle = 1 << (weight.bits - 1)
        codes = _words(tensors["qweight"].T, weight.bits) - middle
        zero = self.zero_points(tensors["qzeros"], weight.bits) - middle
        group = None if weight.in_order else tensors["g_idx"].long()
        return codes, tensors["scales"].T, zero.T, group

    def zero_points(self, qzeros: Tensor, bits: int) -> Tensor:
        """Zero points `[groups, out]`, from 0; a stored one of all bits is 0 in the first version."""
        zero = _words(qzeros, bits)
        return (zero + 1) & ((1 << bits) - 1) if self.less_one else zero


class ModelOptIntegers(Layout):
    """ModelOpt's INT4, two rows a byte, and INT8."""

    def unpacked(
        self, weight: IntegerWeight, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        codes, scale = tensors["weight"], tensors["weight_scale"]
        if weight.bits == 4:
            nibbles = torch.stack((codes & 0xF, codes >> 4), 1).flatten(0, 1)
            codes = (nibbles ^ 0x8).to(torch.int8) - 8
        if "weight_scale_2" in weight.tensors:
            scale = scale.float() * tensors["weight_scale_2"].float()
        return codes, scale.reshape(weight.shape[0], -1), None, None


def awq_weight(local: Local, bits: int = 4) -> IntegerWeight | None:
    """A module in AWQ's gemm layout; None if it is none.

    Raises:
        ValueError: its tensors do not fit one another.
    """
    if "qweight" not in local or "scales" not in local or "g_idx" in local:
        return None
    codes, scales, zeros = local["qweight"].spec, local["scales"].spec, local.get("qzeros")
    _check_matrix("qweight", codes)
    columns, rows = codes.shape[0], codes.shape[-1] * (_WORD // bits)
    group_size = _group_size(columns, scales, (-1, rows))
    if bits != 4 or codes.dtype != torch.int32 or len(codes.shape) != 2 or group_size is None:
        raise ValueError(f"qweight is {codes} and scales {scales}: not AWQ's gemm layout in 4 bits")
    if zeros is not None and zeros.spec.shape != (scales.shape[0], codes.shape[1]):
        raise ValueError(f"qzeros is {zeros.spec}, and scales {scales}")
    names = ("qweight", "scales", *(["qzeros"] if zeros is not None else []))
    width = None if group_size == columns else group_size
    return IntegerWeight(
        (rows, columns), names, (), (), bits, width, scales.dtype, symmetric=zeros is None, layout=AWQ()
    )


def gptq_weight(local: Local, bits: int, *, less_one: bool) -> IntegerWeight | None:
    """A module in GPTQ's layout; None if it is none. Reads its zero points, and the groups of its columns.

    Raises:
        ValueError: its tensors do not fit one another, or codes are of 2 or 3 bits.
    """
    if not {"qweight", "scales", "qzeros"} <= local.keys():
        return None
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits: GPTQ is read in 4 and 8 bits")
    each = _WORD // bits
    codes, scales, zeros = (local[name].spec for name in ("qweight", "scales", "qzeros"))
    _check_matrix("qweight", codes)
    rows, columns = codes.shape[-1], codes.shape[0] * each
    group_size = _group_size(columns, scales, (-1, rows))
    fit = group_size is not None and zeros.shape == (scales.shape[0], -(-rows // each))
    if codes.dtype != torch.int32 or len(codes.shape) != 2 or not fit or rows % each:
        raise ValueError(f"qweight is {codes}, qzeros {zeros} and scales {scales}: not GPTQ's layout in {bits} bits")
    assert group_size is not None
    layout, in_order = GPTQ(less_one), True
    names: tuple[str, ...] = ("qweight", "qzeros", "scales")
    if "g_idx" in local:
        index = local["g_idx"].read()
        if index.shape != (columns,) or not 0 <= int(index.min()) <= int(index.max()) < scales.shape[0]:
            raise ValueError(f"g_idx is {local['g_idx'].spec}, or names groups that are not there")
        in_order = torch.equal(index.long(), torch.arange(columns) // group_size)
        names = (*names, "g_idx")
    middle = 1 << (bits - 1)
    symmetric = bool((layout.zero_points(local["qzeros"].read(), bits) == middle).all())
    width = None if group_size == columns else group_size
    return IntegerWeight((rows, columns), names, (), (), bits, width, scales.dtype, symmetric, in_order, layout)


def modelopt_integers(local: Local) -> IntegerWeight | None:
    """A module in ModelOpt's INT4 or INT8; None if it is none.

    Raises:
        ValueError: its tensors do not fit one another.
    """
    codes, scale = local.get("weight"), local.get("weight_scale")
    if codes is None or scale is None or codes.spec.dtype not in (torch.uint8, torch.int8):
        return None
    bits = 8 if codes.spec.dtype == torch.int8 else 4
    _check_matrix("weight", codes.spec)
    if scale.spec.dtype not in _FLOATS:
        raise ValueError(f"weight is {codes.spec} and weight_scale {scale.spec}")
    rows, columns = codes.spec.shape[0] * (8 // bits), codes.spec.shape[1]
    group_size = columns if scale.spec.shape == (rows,) else _group_size(columns, scale.spec, (rows, -1))
    if group_size is None:
        raise ValueError(f"weight_scale is {scale.spec}, and codes {codes.spec}")
    more = [name for name in ("weight_scale_2", "pre_quant_scale") if name in local]
    if "pre_quant_scale" in more and local["pre_quant_scale"].spec.shape != (columns,):
        raise ValueError(f"pre_quant_scale is {local['pre_quant_scale'].spec}, and the weight has {columns} inputs")
    beside = tuple(name for name in INPUT_SCALES if name in local)
    return IntegerWeight(
        (rows, columns),
        ("weight", "weight_scale", *more),
        beside,
        numbers_of(local, *beside),
        bits,
        None if group_size == columns else group_size,
        scale.spec.dtype,
        symmetric=True,
        layout=ModelOptIntegers(),
    )


def _check_matrix(name: str, spec: TensorSpec) -> None:
    if len(spec.shape) != 2 or not spec.nbytes:
        raise ValueError(f"{name} is {spec}, not a matrix")


def _group_size(columns: int, scales: TensorSpec, shape: tuple[int, int]) -> int | None:
    """Columns that share a scale, from the shape of the scales, -1 for the number of groups; None if none fit."""
    if len(scales.shape) != 2 or scales.dtype not in _FLOATS:
        return None
    groups = scales.shape[shape.index(-1)]
    if scales.shape[1 - shape.index(-1)] != shape[1 - shape.index(-1)] or not groups or columns % groups:
        return None
    return columns // groups


def _words(words: Tensor, bits: int) -> Tensor:
    """Codes int32 `[rows, columns]`, from 0, of words int32 `[rows, columns/c]`, the first code in the low bits."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _awq(words: Tensor) -> Tensor:
    """AWQ's codes int32 `[rows, columns]`, from -8, in the order of the columns."""
    codes: Tensor = _words(words, 4).unflatten(1, (-1, len(_AWQ_ORDER)))
    return codes[..., list(_AWQ_ORDER)].flatten(1) - 8
