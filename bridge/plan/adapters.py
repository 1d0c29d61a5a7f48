"""Adapters in a plan: merged into the weights of their bundle, before anything else sees it.

A, B and DoRA's lengths are parts of the bundle of the weight that they change, and reach its owner as the weight does.
The owner merges whole Hugging Face tensors: the product of a shard would round differently at another mesh, and from
PEFT. Everything after the merge, from the names that are written to the journal, sees a model that never had adapters.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import torch

from amaxbridge.bridge.live.compressed_weights import weight_of
from amaxbridge.bridge.live.model_walk import Parameter, Quantizer
from amaxbridge.bridge.plan.export_plan import BundlePlan, Part
from amaxbridge.export.disk.row_chunks import WholeTensor
from amaxbridge.export.kernels.low_rank import merged
from amaxbridge.export.output.finalizer import Bundle, ChangedWeights
from amaxbridge.mappings.adapters import (
    AdapterMapping,
    AdapterTensor,
    Side,
    adapter_name,
    adapter_tensor,
    is_adapter,
    without_side,
)
from amaxbridge.mappings.amax import LEARNED_POST, PRE_QUANT_SCALE, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import MappingError, UsageError, listing
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec


class WeightAmax(StrEnum):
    """Where weight amax come from if adapters are merged in."""

    STORED = "stored"
    REMEASURE = "remeasure"


class AdapterMode(StrEnum):
    """What to do with adapters."""

    MERGE = "merge"
    ONLY = "only"


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class ScaleOf(Protocol):
    """What says how strongly adapters act."""

    def __call__(self, tensor: AdapterTensor, rank: int, *, has_lengths: bool) -> float:
        """What the product of an adapter is multiplied by.

        Args:
            has_lengths: True for DoRA.
        """


def adapter_mode(name: str | None, alpha: float | None = None, base: str | None = None) -> AdapterMode | None:
    """The mode of this name; None to refuse adapters.

    Args:
        alpha, base: the other options of adapters, None where they are not given.

    Raises:
        UsageError: unknown name, or other options without one. The message lists the known ones.
    """
    known = f"adapter={' or adapter='.join(AdapterMode)}"
    if name is None and alpha is None and base is None:
        return None
    if name is None or name not in list(AdapterMode):
        raise UsageError(f"adapter={name}: give {known}")
    if name == AdapterMode.ONLY and base is not None:
        raise UsageError("adapter.base= is for adapter=merge: adapters alone need no model")
    return AdapterMode(name)


def is_remeasured(name: str, mode: AdapterMode | None) -> bool:
    """True for the policy `remeasure`.

    Raises:
        UsageError: unknown name, or no adapters are merged. The message lists the known ones.
    """
    if name not in list(WeightAmax):
        raise UsageError(f"unknown policy amax.weights={name}; known: {', '.join(WeightAmax)}")
    if name == WeightAmax.REMEASURE and mode is not AdapterMode.MERGE:
        raise UsageError("amax.weights=remeasure is for merged weights: give adapter=merge, or leave it out")
    return name == WeightAmax.REMEASURE


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one Hugging Face weight.

    Args:
        rank: rows of A.
        scale: what the product is multiplied by.
        has_lengths: True for DoRA.
        adapter: the Megatron adapter that it comes from.
    """

    rank: int
    scale: float
    has_lengths: bool
    adapter: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Merges the adapters of bundles.

    Args:
        adapters: Hugging Face module → its adapter.
        remeasured: True if weight amax come from the merged weights.
    """

    adapters: Mapping[str, Adapter]
    remeasured: bool

    @property
    def changed(self) -> ChangedWeights:
        """What the finalizer must know."""
        return ChangedWeights(frozenset(self.adapters), self.remeasured)

    @property
    def notes(self) -> list[str]:
        """What the model card says."""
        kinds = Counter("DoRA" if each.has_lengths else "LoRA" for each in self.adapters.values())
        notes = [f"{count:,} weights have their {kind} adapters merged in" for kind, count in sorted(kinds.items())]
        again = "weight amax of these modules come from the merged weights, not from training (amax.weights=remeasure)"
        return [*notes, *([again] if self.remeasured else [])]

    @property
    def fingerprint(self) -> str:
        """Identifies what the merge makes of given tensors."""
        return json.dumps({module: [each.rank, each.scale.hex()] for module, each in self.adapters.items()})

    def __call__(self, bundle: Bundle) -> Bundle:
        """The bundle without adapters, its weights with them."""
        tensors = dict(bundle.tensors)

        def take(weight: str, side: Side) -> torch.Tensor:
            return _whole(tensors.pop(adapter_name(weight, side)))

        for weight in [name for name in tensors if name.endswith(".weight") and module_of(name) in self.adapters]:
            adapter = self.adapters[module_of(weight)]
            a, b = take(weight, Side.A), take(weight, Side.B)
            lengths = take(weight, Side.LENGTHS) if adapter.has_lengths else None
            tensors[weight] = WholeTensor(merged(_whole(tensors[weight]), a, b, adapter.scale, lengths))
        dropped = self._dropped_state
        return replace(bundle, tensors=tensors, state={n: t for n, t in bundle.state.items() if n not in dropped})

    @property
    def _dropped_state(self) -> set[str]:
        """The per-channel and per-block amax that do not count any more."""
        return {module + WEIGHT_QUANTIZER for module in self.adapters} if self.remeasured else set()

    def without(self, part: Part) -> Part:
        """A part without the tensors that the merge takes away."""
        if isinstance(part.mapping, AdapterMapping):
            return replace(part, tensors={})
        dropped = self._dropped_state & part.tensors.keys()
        kept = {name: spec for name, spec in part.tensors.items() if name not in dropped}
        return replace(part, tensors=kept) if dropped else part


def merging(plan: Sequence[BundlePlan], scale_of: ScaleOf, *, remeasured: bool) -> tuple[list[BundlePlan], Merge]:
    """The plan as if there were no adapters, and what merges them into its bundles.

    Args:
        remeasured: True if weight amax come from the merged weights.

    Raises:
        UsageError: the plan has no adapters.
        MappingError: adapters are incomplete or do not fit their weights; all are named.
    """
    adapters = adapters_of(plan, scale_of)
    problems = [*_misfits(plan, adapters), *(_learned(plan, adapters) if remeasured else ())]
    if problems:
        raise MappingError(f"{len(problems)} adapters cannot be merged:{listing(problems)}")
    merge = Merge(adapters, remeasured)
    return [replace(bundle, parts=tuple(map(merge.without, bundle.parts))) for bundle in plan], merge


def adapters_of(plan: Iterable[BundlePlan], scale_of: ScaleOf) -> dict[str, Adapter]:
    """Hugging Face module → its adapter.

    Raises:
        UsageError: the plan has no adapters.
        MappingError: adapters are incomplete; all are named.
    """
    sides: dict[str, dict[Side, tuple[AdapterTensor, TensorSpec]]] = defaultdict(dict)
    problems = []
    for bundle in plan:
        for part in bundle.parts:
            if isinstance(part.mapping, AdapterMapping):
                tensor = part.mapping.tensor
                for name, spec in part.tensors.items():
                    sides[without_side(module_of(name))][tensor.side] = tensor, spec
    if not sides:
        raise UsageError("adapter= is given, but there are no adapters: leave it out")
    found = {}
    for module, parts in sides.items():
        missing = [side for side in (Side.A, Side.B) if side not in parts]
        (tensor, spec), *_ = parts.values()
        names = {each.adapter for each, _ in parts.values()}
        if missing or len(names) > 1:
            problems.append(f"{tensor.adapter}: has no {' and no '.join(missing)}, or parts of several adapters")
            continue
        tensor, spec = parts[Side.A]
        rank, has_lengths = spec.shape[0], Side.LENGTHS in parts
        scale = scale_of(tensor, rank, has_lengths=has_lengths)
        found[module] = Adapter(rank, scale, has_lengths, tensor.adapter)
    if problems:
        raise MappingError(f"{len(problems)} adapters are incomplete:{listing(problems)}")
    return found


def outside_adapters(quantizers: Iterable[Quantizer]) -> list[Quantizer]:
    """Those that are not inside an adapter; there, the gate lets disabled ones pass alone."""
    return [each for each in quantizers if not is_adapter(each.name)]


def packed_with_adapters(quantizers: Iterable[str], parameters: Iterable[Parameter]) -> list[str]:
    """One line for each weight that `mtq.compress` packed and that an adapter changes.

    Args:
        quantizers: names of the quantizers of packed weights.
    """
    changed = {tensor.weight for each in parameters if (tensor := adapter_tensor(each.name)) is not None}
    weights = map(weight_of, quantizers)
    return [
        f"{weight}: has an adapter, and the merged weight has no codes yet" for weight in weights if weight in changed
    ]


def _misfits(plan: Iterable[BundlePlan], adapters: Mapping[str, Adapter]) -> Iterable[str]:
    """One line for each adapter whose parts do not have the shapes that its weight needs."""
    specs = {name: spec for bundle in plan for name, spec in bundle.specs.items()}
    for module, adapter in adapters.items():
        weight = specs.get(name := f"{module}.weight")
        if weight is None:
            yield f"{adapter.adapter}: the weight that it changes, {name}, is not there"
        elif module + PRE_QUANT_SCALE in specs:
            yield (
                f"{adapter.adapter}: the inputs of {module} are multiplied by a vector (AWQ, SmoothQuant), those of "
                "the adapter are not; calibrate without"
            )
        elif len(weight.shape) != 2 or weight.dtype not in _FLOATS:
            yield f"{adapter.adapter}: changes {name} {weight}, which is no matrix of floats"
        else:
            rows, columns = weight.shape
            wanted = {Side.A: (adapter.rank, columns), Side.B: (rows, adapter.rank), Side.LENGTHS: (rows,)}
            for side, shape in wanted.items():
                part = specs.get(adapter_name(name, side))
                if part is not None and (part.shape != shape or part.dtype not in _FLOATS):
                    yield f"{adapter.adapter}: {side} of {name} {weight} is {part}, not {list(shape)}"


def _learned(plan: Iterable[BundlePlan], adapters: Mapping[str, Adapter]) -> Iterable[str]:
    """One line for each adapter beside learned amax, which nothing can measure."""
    specs = {name for bundle in plan for name in bundle.specs}
    for module, adapter in adapters.items():
        if module + LEARNED_POST in specs:
            yield f"{adapter.adapter}: the amax of {module} were learned (LSQ): leave out amax.weights=remeasure"


def _whole(rows: object) -> torch.Tensor:
    assert isinstance(rows, WholeTensor)
    return rows.tensor
