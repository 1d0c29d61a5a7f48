"""What becomes of a source's quantized modules: kept under the scheme that was asked for, or dequantized.

A module is kept if its codes and scales are that scheme's already, and if all members of its fused group are so, with
one value for what they share. Then nothing is lost. Every other module is dequantized.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.architectures.facts import Knowledge
from amaxbridge.export.disk.packed_experts import PackedSource
from amaxbridge.export.disk.row_chunks import Part
from amaxbridge.export.disk.safetensors_file import StoredTensor
from amaxbridge.export.model_free.converters.quantized_source import QuantizedSource, is_from_packed
from amaxbridge.export.model_free.converters.source_formats import SOURCE_FORMATS
from amaxbridge.export.model_free.converters.stored_weight import INPUT_SCALES, StoredWeight
from amaxbridge.export.schemes import MODELOPT_FORMAT, Recipe, Scheme, variants
from amaxbridge.mappings.errors import CheckpointError, MappingError, listing
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.tensors import TensorSpec

_CACHE_SCALE = re.compile(r"(.+?)(?:\.[kv]_proj)?\.([kv])_scale")
_log = logging.getLogger("amaxbridge")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is made from each quantized module.

    Args:
        source: the quantized modules.
        kept: modules that stay quantized → their scheme. The others are dequantized.
        dtype: dtype of dequantized weights.
        knowledge: what is known of the architecture: how it packs experts.
        modelopt: True if what is made is in ModelOpt's format.
    """

    source: QuantizedSource
    dtype: torch.dtype
    knowledge: Knowledge
    kept: Mapping[str, Scheme]
    modelopt: bool = False

    @property
    def kept_modules(self) -> dict[str, Scheme]:
        """The modules of the output that are kept → their scheme."""
        return {made: scheme for module, scheme in self.kept.items() for made in self.modules_of(module)}

    def modules_of(self, module: str) -> dict[str, PackedSource | None]:
        """The modules of the output that are made from a quantized module, and which part of it each one is."""
        packed = self.packed_name(module)
        if packed is None:
            return {module: None}
        experts = module.rpartition(".")[0]
        name, _, number = experts.rpartition(".")
        found = self.knowledge.experts_in(packed, (1, *self.plain_shape(module)))
        layout = self.knowledge.layout_of(packed)
        if self._is_turned(module):
            layout = replace(layout, transposed=False)
        made: dict[str, PackedSource | None] = {
            single.replace(f"{name}.0.", f"{experts}.").removesuffix(".weight"): replace(
                source, expert=int(number), layout=layout
            )
            for single, source in found.items()
        }
        return made or {module: None}  # refused by name where the architecture is known

    def plain_shape(self, module: str) -> tuple[int, int]:
        """The shape that a module's weight has where its architecture's files are not quantized."""
        rows, columns = self.source.weights[module].shape
        return (columns, rows) if self._is_turned(module) else (rows, columns)

    def turned(self, module: str, weight: Tensor) -> Tensor:
        """A dequantized weight with the axes of `plain_shape`."""
        return weight.t() if self._is_turned(module) else weight

    def _is_turned(self, module: str) -> bool:
        """True if codes have their outputs first and the plain layout has its inputs first."""
        packed = self.packed_name(module)
        weight = self.source.weights[module]
        return packed is not None and weight.outputs_first and self.knowledge.layout_of(packed).transposed

    def beside(self, name: str, stored: StoredTensor) -> tuple[str, StoredTensor]:
        """A tensor that is taken as it is; scales of a key-value cache with the name and the dim that engines know."""
        found = _CACHE_SCALE.fullmatch(name)
        if found is None or stored.spec.nbytes != stored.spec.dtype.itemsize:
            return name, stored
        if self.modelopt:
            name = f"{found[1]}.{found[2]}_proj.{found[2]}_scale"
            return name, replace(stored, spec=TensorSpec((), stored.spec.dtype))
        return f"{found[1]}.{found[2]}_scale", replace(stored, spec=TensorSpec((1,), stored.spec.dtype))

    def can_cut(self, module: str) -> bool:
        """True if the codes of a module can be cut into those of the modules that are made from it."""
        return not self._is_packed(module) or self.source.weights[module].outputs_first

    def packed_name(self, module: str) -> str | None:
        """The packed tensor of the output that a module is a part of where experts stay packed; None if it is none."""
        if not self._is_packed(module):
            return None
        experts, _, part = module.rpartition(".")
        return f"{experts.rpartition('.')[0]}.{part}"

    def specs(self, module: str) -> dict[str, TensorSpec]:
        """The tensors that are made from a module, by full name."""
        weight = self.source.weights[module]
        scheme = self.kept.get(module)
        if scheme is None:
            whole = torch.empty(weight.shape, dtype=self.dtype, device="meta")
            return {
                f"{made}.weight": TensorSpec.of(_cut(whole, part)) for made, part in self.modules_of(module).items()
            }
        specs, rows = weight.specs(scheme), weight.shape[0]
        return {
            f"{made}.{name}": _rows_of(spec, part, rows)
            for made, part in self.modules_of(module).items()
            for name, spec in specs.items()
        }

    def convert(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes them from the stored tensors of a module, by local name."""
        weight, parts = self.source.weights[module], self.modules_of(module)
        scheme = self.kept.get(module)
        if scheme is None:
            whole = weight.dequantize(tensors, self.dtype)
            return {f"{made}.weight": _cut(whole, part).contiguous() for made, part in parts.items()}
        rows = weight.shape[0]
        kept = weight.kept_as(tensors, scheme)
        if damaged := [name for name, tensor in kept.items() if _holds_nan(tensor)]:
            raise MappingError(f"{module}: {', '.join(damaged)} holds NaN or Inf")
        return {
            f"{made}.{name}": (tensor if part is None or tensor.shape[:1] != (rows,) else part.cut(tensor)).contiguous()
            for made, part in parts.items()
            for name, tensor in kept.items()
        }

    def _is_packed(self, module: str) -> bool:
        return is_from_packed(module, self.source.origins[module][0])


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A packed tensor `[experts, …]` whose experts are dequantized one after the other.

    Args:
        conversion: dequantizes them.
        experts: the module of each expert, and its stored tensors by local name.
    """

    conversion: Conversion
    experts: tuple[tuple[str, Mapping[str, StoredTensor]], ...]

    @property
    def spec(self) -> TensorSpec:
        shape = self.conversion.plain_shape(self.experts[0][0])
        return TensorSpec((len(self.experts), *shape), self.conversion.dtype)

    def parts(self, step: int = 1, *, again: bool = False) -> Iterator[Part]:
        for at, (module, stored) in enumerate(self.experts):
            weight = self.conversion.source.weights[module]
            whole = weight.dequantize({name: stored[name].read() for name in weight.names}, self.conversion.dtype)
            yield Part(at, self.conversion.turned(module, whole).contiguous()[None])


def decide(
    source: QuantizedSource,
    recipe: Recipe | None,
    names: Iterable[str],
    *,
    knowledge: Knowledge,
    dtype: torch.dtype,
) -> Conversion:
    """Decides which modules are kept.

    Args:
        recipe: what is asked for; None to dequantize everything.
        names: the names of all stored tensors: a fused group with plain members is not kept.
        knowledge: what is known of the architecture.
        dtype: dtype of dequantized weights.
    """
    modelopt = recipe is not None and recipe.format == MODELOPT_FORMAT
    undecided = Conversion(source, dtype, knowledge, {}, modelopt)
    if recipe is None:
        return undecided
    plain = _plain_modules(source, names)
    kept, near, notes = dict[str, Scheme](), list[str](), list[str]()
    grouped = dict(source.weights)
    for stored in _fused_groups(undecided):
        asked = {module: recipe.scheme_of(made, None) for made, module in stored.items()}
        scheme = next(iter(asked.values()))
        if scheme is None or any(other != scheme for other in asked.values()):
            continue
        weights = _in_group(undecided, asked, scheme)
        holding = _holding(undecided, asked, weights, scheme)
        whole = not plain & set(group_of(next(iter(stored))).members)
        if whole and all(holding) and _agree(weights, scheme):
            kept |= dict.fromkeys(asked, scheme)
            grouped |= zip(asked, weights, strict=True)
            notes += [f"{module}: {weight.note}" for module, weight in zip(asked, weights, strict=True) if weight.note]
        elif hindrances := [each for weight in weights if (each := weight.hindrance(scheme))]:
            near += [f"{made}: {hindrances[0]}" for made in stored]
        elif any(holding):
            near += [
                f"{made}: its fused group is not all in it, or differs in a scale that is shared" for made in stored
            ]
    if notes:
        _log.warning("%d modules are kept with a change:%s", len(notes), listing(notes))
    if near:
        _log.warning(
            "%d modules could not be kept in the scheme asked for, and are dequantized and quantized again:%s",
            len(near),
            listing(near),
        )
    return replace(undecided, source=replace(source, weights=grouped), kept=kept)


def decide_as_held(
    source: QuantizedSource, names: Iterable[str], *, knowledge: Knowledge, dtype: torch.dtype
) -> Conversion:
    """Keeps each module under the scheme that computes what its format does, and dequantizes the others.

    Args:
        names: as in `decide`.
        knowledge: what is known of the architecture.
        dtype: dtype of dequantized weights.
    """
    undecided = Conversion(source, dtype, knowledge, {})
    means = dict.fromkeys(name for each in source.formats for name in SOURCE_FORMATS[each].means)
    schemes = [scheme for name in means for scheme in variants(name)]
    plain, kept, notes = _plain_modules(source, names), dict[str, Scheme](), list[str]()
    grouped = dict(source.weights)
    for stored in _fused_groups(undecided):
        modules = list(dict.fromkeys(stored.values()))
        static = any(name in INPUT_SCALES for module in modules for name in source.weights[module].beside)
        if plain & set(group_of(next(iter(stored))).members):
            continue
        for scheme in schemes:
            weights = _in_group(undecided, modules, scheme)
            same_inputs = (scheme.input_scale is not None) == static
            if same_inputs and all(_holding(undecided, modules, weights, scheme)) and _agree(weights, scheme):
                kept |= dict.fromkeys(modules, scheme)
                grouped |= zip(modules, weights, strict=True)
                notes += [f"{module}: {each.note}" for module, each in zip(modules, weights, strict=True) if each.note]
                break
    if notes:
        _log.warning("%d modules are kept with a change:%s", len(notes), listing(notes))
    return replace(undecided, source=replace(source, weights=grouped), kept=kept)


def _fused_groups(undecided: Conversion) -> list[dict[str, str]]:
    """The quantized members of each fused group: module that is made → the one that it is made from."""
    groups: dict[str, dict[str, str]] = {}
    for module in undecided.source.weights:
        for made in undecided.modules_of(module):
            groups.setdefault(group_of(made).primary, {})[made] = module
    return list(groups.values())


def _plain_modules(source: QuantizedSource, names: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in names if name.endswith(".weight")} - source.weights.keys()


def _in_group(undecided: Conversion, modules: Iterable[str], scheme: Scheme) -> list[StoredWeight]:
    alone = [undecided.source.weights[module] for module in modules]
    return [weight.in_group(alone, scheme) for weight in alone]


def _holding(
    undecided: Conversion, modules: Iterable[str], weights: Iterable[StoredWeight], scheme: Scheme
) -> list[bool]:
    """Which modules can be kept under a scheme by themselves."""
    pairs = zip(modules, weights, strict=True)
    # What numbers scales are, headers do not say.
    return [not scheme.scales and weight.holds(scheme) and undecided.can_cut(module) for module, weight in pairs]


def weight_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype for dequantized weights: float16 where config.json says that the model is in it, else bfloat16."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    said = {str(part.get(key)).removeprefix("torch.") for part in parts for key in ("dtype", "torch_dtype")}
    return torch.float16 if "float16" in said and "bfloat16" not in said else torch.bfloat16


def check_made(made: Mapping[str, Tensor], planned: Mapping[str, TensorSpec]) -> None:
    """Checks that a conversion made what was planned.

    Raises:
        CheckpointError: it did not; every difference is named.
    """
    found = {name: TensorSpec.of(tensor) for name, tensor in made.items()}
    if found != planned:
        differ = [
            f"{name}: {found.get(name, 'missing')}, planned {planned.get(name, 'not at all')}"
            for name in dict.fromkeys((*found, *planned))
            if found.get(name) != planned.get(name)
        ]
        raise CheckpointError(f"a converter made other tensors than it announced:{listing(differ)}")


def _agree(weights: Iterable[StoredWeight], scheme: Scheme) -> bool:
    """True if the members of a fused group have one value for every scale that the scheme shares."""
    counts = scheme.group_scale is not None, scheme.input_scale is not None
    shared = ({item for item in weight.shared if counts[item[0] in INPUT_SCALES]} for weight in weights)
    return len({frozenset(items) for items in shared}) == 1


def _holds_nan(tensor: Tensor) -> bool:
    """True if codes or scales hold NaN or Inf; E4M3 has no Inf, and its NaN is all ones below the sign."""
    if tensor.dtype == torch.float8_e4m3fn:
        return bool((tensor.view(torch.uint8) & 0x7F == 0x7F).any())
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())


def _cut(whole: Tensor, part: PackedSource | None) -> Tensor:
    return whole if part is None else part.cut(whole)


def _rows_of(spec: TensorSpec, part: PackedSource | None, rows: int) -> TensorSpec:
    if part is None or spec.shape[:1] != (rows,):
        return spec
    return TensorSpec.of(part.cut(spec.meta()))
