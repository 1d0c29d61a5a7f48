"""The plan of an export: which bundle is made from what, by whom. Made on specs, before a byte moves.

A bundle holds all tensors of one fused group of Hugging Face modules: the weights and biases, the per-channel or
per-block quantizer state that follows them, and the norm or linear before them if quantizers multiply its output. Every
rank reports its tensors, and computes the same plan from the same reports. So all ranks find the same problems and
raise them together, and none is left waiting in a collective.

Each bundle has one owner among the ranks that hold it (tensor-parallel peers and data-parallel replicas alike); owners
are chosen to spread the bytes evenly. Only the owner's own tensor-parallel group moves shards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from amaxbridge.bridge.live.model_walk import Parameter
from amaxbridge.bridge.plan.input_multipliers import linears_before, norms_with_linears
from amaxbridge.mappings.adapters import NEXT_STEP, is_adapter, without_side
from amaxbridge.mappings.errors import MappingError, UnmappedParameterError, listing
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.lines_to_add import lines_to_add
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import kind_of, module_of, natural_key
from amaxbridge.mappings.ranks import Axis, Ranks
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.mappings.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Part:
    """One Megatron tensor of a bundle.

    Args:
        mapping: resolved mapping; its `megatron_param` is the tensor's global name.
        shard: shape and dtype of each rank's shard.
        tensors: the Hugging Face tensors made from it.
    """

    mapping: MegatronParamMapping
    shard: TensorSpec
    tensors: Mapping[str, TensorSpec]

    @property
    def name(self) -> str:
        return self.mapping.megatron_param


@dataclass(frozen=True, slots=True)
class BundlePlan:
    """The plan of one bundle.

    Args:
        parts: the Megatron tensors it is made from.
        owner: the world rank that joins, quantizes and writes it.
        axis: the mesh axis that shards its parts, None if the owner has every part whole.
        group: world ranks that hold the shards, in shard order; the owner is one of them.
    """

    parts: tuple[Part, ...]
    owner: int
    axis: Axis | None
    group: tuple[int, ...]

    @property
    def key(self) -> str:
        """The bundle's name: the primary module of its fused group."""
        return _bundle_key(self.parts[0].mapping)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All its Hugging Face tensors, quantizer state included."""
        return {name: spec for part in self.parts for name, spec in part.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all its Hugging Face tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def moved_parts(self) -> list[Part]:
        """The parts whose shards move to the owner."""
        return [part for part in self.parts if self.axis is not None and part.mapping.shard_dim is not None]

    def ranks_of(self, part: Part) -> int:
        """The number of ranks that hold a shard of this part."""
        return 1 if self.axis is None or part.mapping.shard_dim is None else len(self.group)


class RankReport(NamedTuple):
    """The tensors of one rank, and its group on each axis that shards parameters."""

    specs: Mapping[str, TensorSpec]
    groups: Mapping[Axis, tuple[int, ...]]


def plan_export(
    parameters: Iterable[Parameter],
    registry: MappingRegistry,
    config: ModelConfig,
    ranks: Ranks,
    *,
    skip: frozenset[str],
) -> list[BundlePlan]:
    """The bundles of a live model, in an order that all ranks agree on. Collective over all ranks.

    Args:
        parameters: this rank's parameters, and the quantizer state that follows them.
        config: the sizes of the model.
        skip: Megatron names that have no tensor of their own on the Hugging Face side (a tied output layer).

    Raises:
        UnmappedParameterError: parameters have no mapping, on any rank.
        MappingError: shapes do not fit, on any rank, or a Hugging Face name would be written twice.
    """
    specs = {parameter.name: TensorSpec.of(parameter.tensor) for parameter in parameters}
    report = RankReport(specs, {axis: ranks.members(axis) for axis in (Axis.TP, Axis.ETP)})
    return plan_reports(ranks.all_gather_object(Axis.WORLD, report), registry, config, skip=skip)


def plan_stored(
    parameters: Iterable[Parameter],
    registry: MappingRegistry,
    config: ModelConfig,
    processes: int,
    *,
    skip: frozenset[str],
) -> list[BundlePlan]:
    """As `plan_export`, for processes that each read the whole model: all compute one plan without communication."""
    specs = {parameter.name: TensorSpec.of(parameter.tensor) for parameter in parameters}
    reports = [RankReport(specs, dict.fromkeys((Axis.TP, Axis.ETP), (rank,))) for rank in range(processes)]
    return plan_reports(reports, registry, config, skip=skip)


def plan_reports(
    reports: Sequence[RankReport], registry: MappingRegistry, config: ModelConfig, *, skip: frozenset[str]
) -> list[BundlePlan]:
    """As `plan_export`, from the reports of all ranks. The ranks need not exist."""
    names = sorted({name for report in reports for name in report.specs} - skip, key=natural_key)
    specs = {name: spec for report in reports for name, spec in report.specs.items()}
    return _Planner(reports, config).plan(find_mappings(names, registry, specs).values())


def find_mappings(
    names: Sequence[str], registry: MappingRegistry, specs: Mapping[str, TensorSpec] = MappingProxyType({})
) -> dict[str, MegatronParamMapping]:
    """The resolved mapping of each Megatron name.

    Args:
        specs: shapes of shards, by which the message guesses what mappings are missing.

    Raises:
        UnmappedParameterError: some names have no mapping; all of them are named, and the lines that would map them; or
            they are adapters, and `registry` does not take any.
    """
    mappings = {name: found for name in names if (found := registry.megatron_to_hf_lookup(name)) is not None}
    unmapped = [name for name in names if name not in mappings]
    adapters = [name for name in unmapped if is_adapter(name)]
    if adapters:
        raise UnmappedParameterError(
            f"{len(adapters)} of {len(names)} Megatron parameters are those of adapters (LoRA):{listing(adapters)}\n"
            f"{NEXT_STEP}. Where that is given, they are of an unknown kind; or experts share them without an axis of "
            "experts, as older releases of Megatron-Bridge saved them: load them with a current one, and save again"
        )
    if unmapped:
        raise UnmappedParameterError(
            f"{len(unmapped)} of {len(names)} Megatron parameters have no mapping:{listing(unmapped)}\n"
            f"To export them, {lines_to_add(registry, megatron={name: specs.get(name) for name in unmapped})}"
        )
    return mappings


def _bundle_key(mapping: MegatronParamMapping) -> str:
    """The primary module of the fused group that a weight, a bias, an adapter or a quantizer's state belongs to."""
    module = without_side(module_of(mapping.targets[0]))
    return group_of(module_of(module) if module.endswith("_quantizer") else module).primary


class _Planner:
    """Chooses owners and collects problems."""

    def __init__(self, reports: Sequence[RankReport], config: ModelConfig) -> None:
        self._reports = reports
        self._config = config
        self._load = [0] * len(reports)
        self._specs = {name: spec for report in reports for name, spec in report.specs.items()}
        self._holders: dict[str, list[int]] = {}
        for rank, report in enumerate(reports):
            for name in report.specs:
                self._holders.setdefault(name, []).append(rank)
        self._joined: dict[tuple[object, ...], list[TensorSpec]] = {}
        self._problems: list[str] = []
        self._writers: dict[str, str] = {}

    def plan(self, mappings: Iterable[MegatronParamMapping]) -> list[BundlePlan]:
        by_name = {mapping.megatron_param: mapping for mapping in mappings}
        with_linear = norms_with_linears(by_name.keys())
        before = {
            _bundle_key(by_name[one]): _bundle_key(by_name[other]) for one, other in linears_before(by_name).items()
        }
        bundles: dict[str, list[MegatronParamMapping]] = {}
        for name, mapping in by_name.items():
            key = _bundle_key(by_name[with_linear.get(name, name)])
            bundles.setdefault(before.get(key, key), []).append(mapping)
        largest_first = sorted(bundles, key=lambda key: -self._nbytes(bundles[key]))  # balances owners better
        planned = {key: self._bundle(bundles[key]) for key in largest_first}
        if self._problems:
            raise MappingError(f"{len(self._problems)} parameters do not fit:{listing(self._problems)}")
        return [planned[key] for key in bundles]

    def _nbytes(self, mappings: Iterable[MegatronParamMapping]) -> int:
        """Bytes of one rank's shards of a bundle."""
        return sum(self._specs[mapping.megatron_param].nbytes for mapping in mappings)

    def _bundle(self, mappings: Sequence[MegatronParamMapping]) -> BundlePlan:
        names = [mapping.megatron_param for mapping in mappings]
        holders = set(self._holders[names[0]]).intersection(*(self._holders[name] for name in names[1:]))
        if not holders:
            self._problems.append(f"{', '.join(names)} are fused, but no rank holds all of them")
            return BundlePlan((), 0, None, (0,))
        owner = min(holders, key=lambda rank: (self._load[rank], rank))
        sharded = next((mapping for mapping in mappings if mapping.shard_dim is not None), None)
        axis = sharded.axis if sharded is not None else None
        group = self._reports[owner].groups[axis] if axis is not None else (owner,)
        parts = [part for mapping in mappings if (part := self._part(mapping, owner, group)) is not None]
        self._load[owner] += sum(spec.nbytes for part in parts for spec in part.tensors.values())
        return BundlePlan(tuple(parts), owner, axis if len(group) > 1 else None, group)

    def _part(self, mapping: MegatronParamMapping, owner: int, group: tuple[int, ...]) -> Part | None:
        name = mapping.megatron_param
        shards = {rank: self._reports[rank].specs.get(name) for rank in {*group, *self._holders[name]}}
        if len(set(shards.values())) != 1:
            held = ", ".join(f"rank {rank}: {spec or 'nothing'}" for rank, spec in sorted(shards.items()))
            self._problems.append(f"{name}: ranks of {mapping.axis} hold different shards: {held}")
            return None
        shard = self._reports[owner].specs[name]
        count = len(group) if mapping.shard_dim is not None else 1
        try:
            tensors = self._join(mapping, shard, count)
        except MappingError as error:
            self._problems.append(str(error))
            return None
        for target in tensors:
            first = self._writers.setdefault(target, name)
            if first != name:
                self._problems.append(f"{target} would be written by {first} and by {name}")
        return Part(mapping, shard, tensors)

    def _join(self, mapping: MegatronParamMapping, shard: TensorSpec, count: int) -> dict[str, TensorSpec]:
        """The specs that a mapping joins from equal shards; computed once for all like layers and experts."""
        kind = type(mapping), kind_of(mapping.megatron_param), *map(kind_of, mapping.targets), shard, count
        if kind not in self._joined:
            joined = mapping.join([shard.meta()] * count, self._config)
            if tuple(joined) != mapping.targets:
                return {target: TensorSpec.of(tensor) for target, tensor in joined.items()}
            self._joined[kind] = [TensorSpec.of(tensor) for tensor in joined.values()]
        return dict(zip(mapping.targets, self._joined[kind], strict=True))
