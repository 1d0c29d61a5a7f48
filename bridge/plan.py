"""The plan of an export: which bundle is made from what, by whom. Made on specs, before a byte moves.

A bundle is all Hugging Face tensors that come from one Megatron parameter. Every rank reports the parameters it
holds; from the same reports every rank computes the same plan, so problems are found everywhere at once and raised
together, and no rank is left waiting in a collective.

Each bundle has one owner among the ranks that hold it (their tensor-parallel peers and data-parallel replicas);
owners are chosen to spread the bytes evenly. Only the owner's own tensor-parallel group moves the shards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bridge.parameters import Parameter
from mappings.errors import MappingError, UnmappedParameterError, listing
from mappings.mapping import MegatronParamMapping
from mappings.names import natural_key
from mappings.ranks import Axis, Ranks
from mappings.registry import MappingRegistry
from mappings.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class BundlePlan:
    """One Megatron parameter on its way.

    Args:
        mapping: resolved; its `megatron_param` is the parameter's global name.
        shard: shape and dtype of each rank's shard.
        tensors: the Hugging Face tensors it becomes.
        group: world ranks that hold the shards, in shard order.
        owner: the world rank, one of `group`, that joins and writes them.
    """

    mapping: MegatronParamMapping
    shard: TensorSpec
    tensors: Mapping[str, TensorSpec]
    group: tuple[int, ...]
    owner: int


class _Report(NamedTuple):
    """What one rank holds, and its group on each axis that shards parameters."""

    specs: dict[str, TensorSpec]
    groups: dict[Axis, tuple[int, ...]]


def plan_export(
    parameters: Iterable[Parameter], registry: MappingRegistry, config: Any, ranks: Ranks, *, skip: frozenset[str]
) -> list[BundlePlan]:
    """The bundles of a live model in an order all ranks agree on. Collective over all ranks.

    Args:
        parameters: of this rank.
        config: the model's configuration, as the mappings read it.
        skip: Megatron names that have no tensor of their own on the Hugging Face side (a tied output layer).

    Raises:
        UnmappedParameterError: parameters without a mapping.
        MappingError: shapes that do not fit, on any rank, or a Hugging Face name that would be written twice.
    """
    specs = {parameter.name: TensorSpec.of(parameter.tensor) for parameter in parameters}
    axes = (Axis.TP, Axis.ETP)
    report = _Report(specs, {axis: ranks.members(axis) for axis in axes})
    reports: list[_Report] = ranks.all_gather_object(Axis.WORLD, report)
    names = sorted({name for report in reports for name in report.specs} - skip, key=natural_key)
    return _Planner(reports, config).plan(find_mappings(names, registry).values())


def find_mappings(names: Sequence[str], registry: MappingRegistry) -> dict[str, MegatronParamMapping]:
    """The resolved mapping of each Megatron name.

    Raises:
        UnmappedParameterError: some have none; all of them are named.
    """
    mappings = {name: found for name in names if (found := registry.megatron_to_hf_lookup(name)) is not None}
    unmapped = [name for name in names if name not in mappings]
    if unmapped:
        raise UnmappedParameterError(
            f"{len(unmapped)} of {len(names)} Megatron parameters have no mapping:{listing(unmapped)}\n"
            "Add a mapping to the model's family in mappings/families/"
        )
    return mappings


class _Planner:
    """Chooses owners and collects problems."""

    def __init__(self, reports: list[_Report], config: Any) -> None:
        self._reports = reports
        self._config = config
        self._load = [0] * len(reports)
        self._problems: list[str] = []
        self._writers: dict[str, str] = {}

    def plan(self, mappings: Iterable[MegatronParamMapping]) -> list[BundlePlan]:
        bundles = [bundle for mapping in mappings if (bundle := self._bundle(mapping)) is not None]
        if self._problems:
            raise MappingError(f"{len(self._problems)} parameters do not fit:{listing(self._problems)}")
        return bundles

    def _bundle(self, mapping: MegatronParamMapping) -> BundlePlan | None:
        name = mapping.megatron_param
        holders = [rank for rank, report in enumerate(self._reports) if name in report.specs]
        owner = min(holders, key=lambda rank: self._load[rank])
        group = self._reports[owner].groups[mapping.axis] if mapping.shard_dim is not None else (owner,)
        shards = {rank: self._reports[rank].specs.get(name) for rank in {*group, *holders}}
        if len(set(shards.values())) != 1:
            held = ", ".join(f"rank {rank}: {spec or 'nothing'}" for rank, spec in sorted(shards.items()))
            self._problems.append(f"{name}: ranks of {mapping.axis} hold different shards: {held}")
            return None
        shard = self._reports[owner].specs[name]
        try:
            tensors = mapping.join([shard.meta()] * len(group), self._config)
        except MappingError as error:
            self._problems.append(str(error))
            return None
        for target in tensors:
            first = self._writers.setdefault(target, name)
            if first != name:
                self._problems.append(f"{target} would be written by {first} and by {name}")
        self._load[owner] += sum(shard.nbytes for _ in group)
        return BundlePlan(mapping, shard, {key: TensorSpec.of(value) for key, value in tensors.items()}, group, owner)
