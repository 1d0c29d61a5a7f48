"""A quantized Hugging Face directory as training needs it: weights in 16 bits, and the amax that its scales stand for.

Every weight is read and dequantized when it is asked for, so one is in memory at a time. For 4-bit formats dequantizing
is not enough: the weight is one that ModelOpt quantizes to the same bytes again (`kernels.restore`). Whether it does is
not assumed: each weight is quantized once more, and what does not come back is noted in `changed`.

Formats that no ModelOpt quantizer has (zero points) are dequantized all the same, and have no entry in `formats`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import amax_of_divisor, amax_of_scale
from amaxbridge.export.amax.cache_scales import amax_of_cache_scale, stored_cache_scales
from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.kernels.nvfp4 import NVFP4Weight
from amaxbridge.export.kernels.restore import restore_mx, restore_nvfp4
from amaxbridge.export.schemes import Groups, Scheme, SchemeGroup, find_scheme
from amaxbridge.export.schemes.mx import MX
from amaxbridge.export.schemes.nvfp4 import NVFP4
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec, max_of

_ARGUMENTS = {  # defaults of compressed-tensors' QuantizationArgs
    "num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": None, "block_structure": None,
    "dynamic": False,
}  # fmt: skip
_READ_AS_THEY_ARE = ("mxfp4",)  # packed experts of GPT-OSS, which `SafetensorsCheckpoint` cuts
_ANY = TensorSpec((1024, 1024), torch.bfloat16)  # which tensors a scheme writes does not depend on the shape


@dataclass(frozen=True, slots=True)
class Changed:
    """What of a weight does not come back when it is quantized again.

    Args:
        scales: block scales that become others.
        codes: bytes of codes that become others.
        values: whether what the bytes stand for changes, beyond scales of blocks of zeros.
        divisor: whether the global scale becomes another, by one bit: no amax makes it.
    """

    scales: int
    codes: int
    values: bool
    divisor: bool

    def __str__(self) -> str:
        parts = [f"{self.scales:,} block scales"] * (self.scales > 0) + [f"{self.codes:,} bytes"] * (self.codes > 0)
        parts += ["the last bit of the global scale"] * self.divisor
        return ", ".join(parts) + ("" if self.values else "; the values are the same")


class DequantizedCheckpoint:
    """The tensors of a directory by name, weights dequantized.

    Args:
        checkpoint: open for reading.
        quantization: `quantization_config` of its config.json; None where it is not quantized.

    Raises:
        UsageError: another quantization than of compressed-tensors, or a format that is not known here.
        CheckpointError: a quantized module lacks tensors, or config.json gives it no scheme; all are named.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, quantization: Mapping[str, Any] | None) -> None:
        self.checkpoint = checkpoint
        self.changed: dict[str, Changed] = {}
        self.schemes: Mapping[str, Scheme] = {}
        self.cache_scales = stored_cache_scales(checkpoint.weight_map, quantization)
        method = (quantization or {}).get("quant_method", "compressed-tensors")
        if quantization is not None and method not in _READ_AS_THEY_ARE:
            if method != "compressed-tensors":
                raise UsageError(
                    f"{checkpoint.directory} is quantized as quant_method={method!r}; only compressed-tensors is read"
                )
            self.schemes = self._find_schemes(recipe_from_config(quantization))

    @cached_property
    def state(self) -> QuantState:
        """Amax and formats for the quantizers of a trained model; each amax is read when it is asked for."""
        formats = {module: scheme.format for module, scheme in self.schemes.items() if scheme.format}
        return QuantState(amax=_LazyAmax(self), formats=formats)

    def read(self, name: str) -> Tensor:
        """One tensor; the weight of a quantized module in bf16.

        Raises:
            CheckpointError: there is no such tensor.
        """
        module = module_of(name)
        if module not in self.schemes or not name.endswith(".weight"):
            return self.checkpoint.read(name)
        scheme = self.schemes[module]
        stored = {each: self.checkpoint.read(each) for each in _names(scheme, module)}
        if isinstance(scheme, NVFP4):
            amax = amax_of_divisor(stored[f"{module}.weight_global_scale"])
            names = ("weight_packed", "weight_scale", "weight_global_scale")
            factor_2 = amax / torch.full_like(amax, 2688.0)
            weight = restore_nvfp4(NVFP4Weight(*(stored[f"{module}.{each}"] for each in names)), factor_2)
        else:
            weight = scheme.dequantize(module, stored)
        if isinstance(scheme, MX):
            weight = restore_mx(weight, stored[f"{module}.weight_scale"], 6.0 if scheme.bits == 4 else 448.0)
        if scheme.format:
            self._compare(module, scheme, stored, weight)
        return weight

    def amax(self, quantizer: str) -> Tensor | None:
        """The amax of a quantizer by buffer name, `….weight_quantizer._amax`; None where the format has none.

        fp32; of a weight's blocks `[blocks down, blocks across]`, else 0-d.
        """
        if quantizer in self.cache_scales:
            return amax_of_cache_scale(self.checkpoint.read(self.cache_scales[quantizer]))
        module = quantizer.rpartition("_quantizer.")[0].rpartition(".")[0]
        scheme = self.schemes.get(module)
        if scheme is None or not scheme.format:
            return None
        if quantizer == module + INPUT_QUANTIZER and scheme.needs_input_amax:
            return self._tensor_amax(module, scheme, "input")
        if quantizer != module + WEIGHT_QUANTIZER:
            return None
        if scheme.needs_weight_amax:
            return self._tensor_amax(module, scheme, "weight")
        if isinstance(scheme, Scaled):
            return amax_of_scale(self.checkpoint.read(f"{module}.weight_scale"), scheme.code.bound)
        return None

    def _tensor_amax(self, module: str, scheme: Scheme, of: str) -> Tensor:
        if isinstance(scheme, Scaled):
            return amax_of_scale(self.checkpoint.read(f"{module}.{of}_scale").reshape(()), scheme.code.bound)
        return amax_of_divisor(self.checkpoint.read(f"{module}.{of}_global_scale"))

    def _compare(self, module: str, scheme: Scheme, stored: Mapping[str, Tensor], weight: Tensor) -> None:
        """Quantizes a weight again, with the amax that its quantizer will have: the largest of its fused group."""
        own, shared = self.amax(module + WEIGHT_QUANTIZER), None
        if scheme.needs_weight_amax:
            members = [member for member in group_of(module).members if self.schemes.get(member) is scheme]
            found = (self.amax(member + WEIGHT_QUANTIZER) for member in members)
            shared = max_of([amax for amax in found if amax is not None])
        group = GroupAmax(shared, torch.ones(()))
        again = scheme.quantize_rows(module, weight, group, None if scheme.needs_weight_amax else own)
        again |= scheme.constants(module, TensorSpec.of(weight), group)
        differ = {name.rpartition(".")[2]: _differences(tensor, stored[name]) for name, tensor in again.items()}
        constants = {"input_global_scale", "input_scale", "weight_shape"}
        if any(count for name, count in differ.items() if name not in constants):
            self.changed[module] = Changed(
                scales=differ.get("weight_scale", 0),
                codes=differ.get("weight_packed", differ.get("weight", 0)),
                values=not torch.equal(scheme.dequantize(module, again), scheme.dequantize(module, stored)),
                divisor=bool(differ.get("weight_global_scale", 0)),
            )

    def _find_schemes(self, recipe: Groups) -> dict[str, Scheme]:
        tensors = self.checkpoint.weight_map
        quantized = {module_of(name) for name in tensors if name.endswith((".weight_packed", ".weight_scale"))}
        found = {module: recipe.scheme_of(module, None) for module in sorted(quantized)}
        problems = [
            f"{module}: quantized, and no group of config.json targets it" for module in found if not found[module]
        ]
        schemes = {module: scheme for module, scheme in found.items() if scheme is not None}
        problems += [
            f"{name}: missing, which {scheme.name} has"
            for module, scheme in schemes.items()
            for name in _names(scheme, module)
            if name not in tensors
        ]
        if problems:
            raise CheckpointError(f"{self.checkpoint.directory} is not what its config.json says:{listing(problems)}")
        return schemes


class _LazyAmax(Mapping[str, Tensor]):
    """All amax of a checkpoint by buffer name, each read when asked for: a rank needs those of its own modules."""

    def __init__(self, source: DequantizedCheckpoint) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        amax = self._source.amax(name)
        if amax is None:
            raise KeyError(name)
        return amax

    def __iter__(self) -> Iterator[str]:
        yield from self._source.cache_scales
        for module, scheme in self._source.schemes.items():
            if scheme.format and (scheme.needs_weight_amax or isinstance(scheme, Scaled)):
                yield module + WEIGHT_QUANTIZER
            if scheme.format and scheme.needs_input_amax:
                yield module + INPUT_QUANTIZER

    def __len__(self) -> int:
        return sum(1 for _ in self)


def recipe_from_config(quantization: Mapping[str, Any]) -> Groups:
    """What the `quantization_config` of compressed-tensors in a config.json says of every module.

    Raises:
        UsageError: a group in a format that is not known here.
    """
    groups: list[SchemeGroup] = []
    for group in (quantization.get("config_groups") or {}).values():
        parts = {part: group.get(part) for part in ("weights", "input_activations")}
        wanted = {part: said and SimpleNamespace(**{**_ARGUMENTS, **said}) for part, said in parts.items()}
        recipe = find_scheme(SimpleNamespace(**wanted, targets=group.get("targets") or ()))
        assert isinstance(recipe, Groups)
        groups += recipe.groups
    return Groups(tuple(groups), tuple(quantization.get("ignore") or ()))


def _names(scheme: Scheme, module: str) -> list[str]:
    """The tensors of a quantized module."""
    return list(scheme.output_specs(module, _ANY, calibrated=True))


def _differences(one: Tensor, other: Tensor) -> int:
    """How many elements are not the same; -0.0 and 0.0 are not, scales in another dtype may be."""
    if one.dtype == other.dtype:
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
        one, other = one.contiguous().view(view), other.contiguous().view(view)
    else:
        one, other = one.float(), other.float()
    return 0 if torch.equal(one, other) else int((one != other).sum())
