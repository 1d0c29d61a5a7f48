"""Weights that `mtq.compress` stores as codes, read so that quantizing them again makes the same codes and scales.

    format   weight                  _scale                              _double_scale
    NVFP4    uint8 [out, in/2]       E4M3 [out, in/16]                   amax / 2688
    FP8      E4M3 [out, in]          amax / 448, one, or [out, 1]
    INT4     uint8 [out, in/2]       7 / amax, [out · in/block, 1]

NVFP4 has the even column of a byte in the low nibble. INT4 has it in the high one, and stores codes plus 8. The amax is
taken from these scales, which the codes were made with; the amax beside them may have been rounded since.

Sources: modelopt.torch.quantization 0.47.0, `TensorQuantizer._real_quantize`, and qtensor: nvfp4_tensor, fp8_tensor,
int4_tensor.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from amaxbridge.bridge.live.model_walk import Parameter, Quantizer
from amaxbridge.export.amax.amax_from_scales import amax_of_scale
from amaxbridge.export.kernels import e2m1
from amaxbridge.export.kernels.nvfp4 import BLOCK, FP8_MAX, SCALE_RANGE, NVFP4Weight
from amaxbridge.export.kernels.restore import restore_nvfp4
from amaxbridge.mappings.amax import stored_scales_name
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.mappings.tensors import TensorSpec

_INT4_BOUND = 7.0
_OF_OTHER_MODULES = {"q_a_proj", "kv_a_proj_with_mqa"}  # members of one fused group, which Megatron has apart
_WEIGHT = re.compile(r"\.weight\d*$")


class Packing(StrEnum):
    """A format of `mtq.compress`: the name of ModelOpt's class."""

    NVFP4 = "NVFP4QTensor"
    FP8 = "FP8QTensor"
    INT4 = "INT4QTensor"

    @property
    def has_two_in_a_byte(self) -> bool:
        return self is not Packing.FP8


def packing_of(quantizer: Quantizer) -> Packing | None:
    """How a quantizer's weight is packed; None if it is not, or in a way that is not read here."""
    held = quantizer.attributes
    is_packed = held.get("_dequantize") is True and held.get("_fake_quant") is False
    if not is_packed or "weight_quantizer" not in quantizer.name or quantizer.chain or held.get("_lsq"):
        return None
    if not isinstance(held.get("_scale"), Tensor):
        return None
    bits, blocks = held.get("_num_bits"), dict(held.get("_block_sizes") or {})
    blocks.pop("type", None)
    if bits == (2, 1) and blocks == {-1: BLOCK, "scale_bits": (4, 3)} and "_double_scale" in held:
        return Packing.NVFP4
    if bits == (4, 3) and not blocks:
        return Packing.FP8
    return Packing.INT4 if bits == 4 and blocks.keys() == {-1} else None


def amax_of_scales(packing: Packing, scale: Tensor, double_scale: Tensor | None) -> Tensor:
    """The amax that the codes were made with: fp32, `[]`, `[out, 1]`, or `[out · blocks, 1]`."""
    if packing is Packing.NVFP4:
        assert double_scale is not None
        return amax_of_scale(double_scale.reshape(()), SCALE_RANGE)
    if packing is Packing.FP8:
        return amax_of_scale(scale if scale.numel() > 1 else scale.reshape(()), FP8_MAX)
    return _INT4_BOUND / scale.float()


def unpacked(packing: Packing, codes: Tensor, scale: Tensor, double_scale: Tensor | None, *, restores: bool) -> Tensor:
    """The weight `[out, in]`, bf16.

    Args:
        restores: True for values that are quantized to the same codes and scales again; False for what ModelOpt
            computes with.
    """
    if packing is Packing.NVFP4:
        assert double_scale is not None
        factor = double_scale.float().reshape(1)
        if restores:
            return restore_nvfp4(NVFP4Weight(codes, scale, factor.reciprocal()), factor)
        values: Tensor = e2m1.unpack(codes).unflatten(1, (-1, BLOCK)) * (scale.float() * factor).unsqueeze(-1)
        return values.flatten(1).to(torch.bfloat16)
    if packing is Packing.FP8:
        return (codes.float() * scale.float()).bfloat16()
    signed = torch.stack((codes >> 4, codes & 0xF), -1).flatten(1).float() - 8
    blocks: Tensor = signed.unflatten(1, (scale.numel() // len(codes), -1))
    steps = scale.float().reshape(len(codes), -1, 1)
    return (blocks / steps).flatten(1).bfloat16()


def fault_of_scales(name: str, packing: Packing, codes: TensorSpec, scale: TensorSpec, block: int | None) -> str | None:
    """What is wrong with scales that do not lie in the rows of the codes; None if they do."""
    rows, width = codes.shape[0], codes.shape[-1] * (2 if packing.has_two_in_a_byte else 1)
    count, blocks = _count(scale.shape), 1 if block is None else width // block
    fits = len(codes.shape) == 2 and (block is None or width % block == 0)
    counts = (1, rows) if packing is Packing.FP8 else (rows * blocks,)
    if fits and count in counts and scale.shape[:1] in ((), (1,), (rows,), (rows * blocks,)):
        return None
    of_blocks = f" in blocks of {block}" if block else ""
    return f"{name}: codes {codes} with scales {scale}, not those of its own rows{of_blocks}"


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@dataclass(frozen=True, slots=True, eq=False)
class CompressedWeight:
    """A packed weight of a live model, in the place of its parameter: it is unpacked when its turn comes.

    Args:
        shape: `[out, in]`.
    """

    packing: Packing
    codes: Tensor
    module: Any
    shape: torch.Size
    restores: bool
    dtype: torch.dtype = torch.bfloat16
    _quantizer: None = None  # as Transformer Engine's quantized parameters have one

    def detach(self) -> "CompressedWeight":
        """This weight: it needs no gradient."""
        return self

    def dequantize(self) -> Tensor:
        """The weight, bf16."""
        double_scale = getattr(self.module, "_double_scale", None)
        return unpacked(self.packing, self.codes, self.module._scale, double_scale, restores=self.restores)


def without_packing(
    parameters: Iterable[Parameter], quantizers: Iterable[Quantizer], is_plain: Callable[[str], bool]
) -> tuple[list[Parameter], list[str]]:
    """The parameters of a rank, with a `CompressedWeight` in the place of each packed one.

    Args:
        is_plain: quantizer → True if its weight is written unquantized.

    Returns:
        The parameters, and one line for each that cannot be unpacked.
    """
    packings = {weight_of(each.name): (each, found) for each in quantizers if (found := packing_of(each)) is not None}
    held, problems = list[Parameter](), list[str]()
    for parameter in parameters:
        if parameter.name not in packings:
            held.append(parameter)
            continue
        quantizer, packing = packings[parameter.name]
        codes, scale, block = parameter.tensor.data, quantizer.module._scale, block_of(quantizer.attributes)
        if fault := fault_of_scales(parameter.name, packing, TensorSpec.of(codes), TensorSpec.of(scale), block):
            problems.append(fault)
            continue
        columns = codes.shape[1] * (2 if packing.has_two_in_a_byte else 1)
        weight: Any = CompressedWeight(
            packing, codes, quantizer.module, torch.Size((len(codes), columns)), not is_plain(quantizer.name)
        )
        held.append(replace(parameter, tensor=weight))
    return held, problems


def block_of(attributes: Mapping[str, Any]) -> int | None:
    """The columns that share a scale; None for all."""
    size = (attributes.get("_block_sizes") or {}).get(-1)
    return size if isinstance(size, int) else None


def faults_of_groups(packings: Iterable[tuple[str, Packing]], registry: MappingRegistry) -> list[str]:
    """One line for each packed weight that engines run with one of another Megatron module: one scale is for all."""
    faults = []
    for quantizer, packing in packings:
        mapping = registry.megatron_to_hf_lookup(f"{quantizer}._amax")
        modules = {module_of(module_of(target)) for target in mapping.targets} if mapping is not None else set[str]()
        others = {member for module in modules for member in group_of(module).members} - modules
        if packing is not Packing.INT4 and {name.rpartition(".")[2] for name in others} & _OF_OTHER_MODULES:
            faults.append(
                f"{quantizer}: its scale is its own, and engines run {', '.join(sorted(modules | others))} as one"
            )
    return faults


def shared_scales(quantizers: Iterable[Quantizer], registry: MappingRegistry) -> dict[str, str]:
    """By quantizer, a digest of the scales of packed weights that all ranks with a shard must have alike."""
    scales = {}
    for each in quantizers:
        packing, mapping = packing_of(each), registry.megatron_to_hf_lookup(weight_of(each.name))
        scale = each.module._double_scale if packing is Packing.NVFP4 else getattr(each.module, "_scale", None)
        of_rows = mapping is not None and mapping.shard_dim == 1
        if packing in (Packing.NVFP4, Packing.FP8) and scale is not None and (scale.numel() == 1 or of_rows):
            scales[each.name] = hashlib.sha256(scale.detach().float().cpu().numpy().tobytes()).hexdigest()
    return scales


def faults_of_ranks(reports: Iterable[Mapping[str, str]]) -> list[str]:
    """One line for each packed weight whose shards have several scales, from the `shared_scales` of all ranks."""
    found: dict[str, set[str]] = {}
    for report in reports:
        for name, scales in report.items():
            found.setdefault(name, set()).add(scales)
    return [f"{name}: ranks packed it under {len(each)} scales" for name, each in found.items() if len(each) > 1]


def check_unpackable(problems: Sequence[str]) -> None:
    """Refuses packed weights with problems.

    Raises:
        UsageError: there are any; all of them are named.
    """
    if problems:
        raise UsageError(
            f"{len(problems)} weights that mtq.compress packed cannot be written from their codes:{listing(problems)}\n"
            "Export the model from before mtq.compress"
        )


def weight_of(quantizer: str) -> str:
    """The name of a quantizer's weight: `….weight`, or `….weight3` of a grouped expert."""
    owner, _, expert = quantizer.partition(".weight_quantizer")
    return f"{owner}.weight{expert.removeprefix('.')}"


def quantizer_of(name: str) -> str:
    """The name of the quantizer of a weight, or of the quantizer that a buffer belongs to; "" for other tensors."""
    if "weight_quantizer" in name:
        return module_of(name)
    return module_of(stored_scales_name(name)) if _WEIGHT.search(name) else ""


def one_scale_of_each_row(name: str, scale: Tensor) -> Tensor:
    """The scales `[out, 1]` that each tensor-parallel rank saved a copy of, side by side.

    Raises:
        CheckpointError: the copies differ.
    """
    if not torch.equal(scale, scale[:, :1].expand_as(scale)):
        raise CheckpointError(
            f"{name}: ranks have scales of their own for the same rows, which no format holds: export the live model "
            "from before mtq.compress"
        )
    return scale[:, :1]
