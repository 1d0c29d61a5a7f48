"""The plan of an export on a mesh that need not exist: a dry run for a model of any size, on a laptop.

The shards of each rank follow from config.json alone, so neither a checkpoint nor Megatron is needed. The plan is made
by the code of a live export, with an assumed amax for every quantizer.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import torch

from amaxbridge.bridge.hf import HFModel, check_parallel_sizes
from amaxbridge.bridge.live.bundle_stream import BUCKET_BYTES
from amaxbridge.bridge.plan.export_plan import BundlePlan, RankReport, plan_reports
from amaxbridge.bridge.plan.left_behind import check_nothing_is_left
from amaxbridge.bridge.plan.mesh import Mesh
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.bridge.save import ExportReport, Saver
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.staging import ALONE
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.output.writing_processes import Apart
from amaxbridge.export.schemes import Recipe, find_scheme
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.ranks import Axis
from amaxbridge.output_options import SaveKeywords, SaveOptions, options_from

_NEVER_QUANTIZED = ("embedding.", "output_layer.", ".router.", "eh_proj.")  # by ModelOpt's presets


@dataclass(frozen=True, slots=True)
class RankShare:
    """The share of one rank in an export.

    Args:
        held: bytes of its shards of the live model; 0 if a checkpoint is read from files.
        bundles: number of bundles that it joins, quantizes and writes.
        received: bytes of shards from other ranks.
        written: bytes of tensors that it writes.
        peak: peak bytes of memory beside its shards: the largest bundle in both forms, and buckets in flight.
    """

    held: int
    bundles: int
    received: int
    written: int
    peak: int


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """A dry run of an export.

    Args:
        mesh: the assumed mesh.
        export: the report of such an export.
        shares: the share of each rank, in rank order.
        needed_amax: quantizers whose amax the checkpoint must have.
    """

    mesh: Mesh
    export: ExportReport
    shares: Sequence[RankShare]
    needed_amax: Sequence[str]


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """A dry run of an import.

    Args:
        mesh: the mesh that the import needs.
        schemes: scheme → number of its Hugging Face modules.
        held: bytes of the bf16 shards of each rank, in rank order.
    """

    mesh: Mesh
    schemes: Mapping[str, int]
    held: Sequence[int]


def plan_on_mesh(hf: HFModel, mesh: Mesh, target: Path, **options: Unpack[SaveKeywords]) -> MeshPlan:
    """The plan of an export at the given sizes.

    Raises:
        UsageError: as `MegatronSpecs`, or the model cannot be built at these sizes, or the recipe reads formats from
            quantizers.
        MappingError: a module cannot be quantized as asked; all are named.
    """
    check_parallel_sizes(hf, world=mesh.world, tp=mesh.tp, pp=mesh.pp, ep=mesh.ep, etp=mesh.etp, even=False)
    config = hf.model_config.padded_to(mesh.tp)
    reports = list(_reports(MegatronSpecs(hf, config), mesh))
    bundles = plan_reports(reports, hf.registry, config, skip=hf.without_tensor)
    asked = replace(options_from(SaveOptions, options), dry_run=True)
    state = _supposed_state(bundles, find_scheme(asked.scheme))
    report = Saver(hf, Apart(ALONE), target, asked).save(bundles, _nothing, lambda: state)
    held = [sum(spec.nbytes for spec in rank.specs.values()) for rank in reports]
    return MeshPlan(mesh, report, rank_shares(report, held), list(state.amax))


def plan_import(hf: HFModel, mesh: Mesh) -> ImportPlan:
    """The plan of an import at the given sizes: the directory is checked, and no model is built.

    Raises:
        UsageError: Megatron does not compute this model, or it cannot be built at these sizes.
        CheckpointError: files or tensors are missing, or Megatron has no place for some; all are named.
    """
    hf.family.check_buildable(hf.config)
    check_parallel_sizes(hf, world=mesh.world, tp=mesh.tp, pp=mesh.pp, ep=mesh.ep, etp=mesh.etp)
    specs = MegatronSpecs(hf, hf.model_config.padded_to(mesh.tp))
    with hf.open_weights() as weights:
        schemes = weights.schemes
        missing = [
            name
            for mapping in specs.mappings.values()
            for name in mapping.targets
            if module_of(name) not in schemes and not weights.checkpoint.has(name)
        ]
        if missing:
            raise CheckpointError(f"{hf.directory} lacks {len(missing)} tensors of its model:{listing(missing)}")
        check_nothing_is_left(hf, weights, [name for each in specs.mappings.values() for name in each.targets])
    held = [sum(spec.nbytes for spec in rank.specs.values()) for rank in _reports(specs, mesh)]
    return ImportPlan(mesh, Counter(scheme.name for scheme in schemes.values()), held)


def rank_shares(report: ExportReport, held: Sequence[int]) -> list[RankShare]:
    """The share of each rank.

    Args:
        held: bytes of the shards of each rank.
    """
    outputs: dict[str, int] = {}
    for shard in report.layout.shards:
        for name, spec in shard.specs.items():
            outputs[module_of(name)] = outputs.get(module_of(name), 0) + spec.nbytes
    shares = [[each, 0, 0, 0, 0] for each in held]
    for bundle in report.bundles:
        joined = sum(spec.nbytes for spec in bundle.specs.values())
        modules = {module_of(name) for name in bundle.specs}
        written = sum(outputs.get(module, 0) for module in modules)
        moved = sum(part.shard.nbytes for part in bundle.moved_parts)
        received = moved * (len(bundle.group) - 1)
        share = shares[bundle.owner]
        share[1] += 1
        share[2] += received
        share[3] += written
        buckets = 2 * max(BUCKET_BYTES, moved * len(bundle.group)) if bundle.moved_parts else 0
        share[4] = max(share[4], joined + written + buckets)
    return [RankShare(*share) for share in shares]


def _reports(specs: MegatronSpecs, mesh: Mesh) -> Iterator[RankReport]:
    """The report of each rank; ranks of one place share it."""
    held = {
        place: {name: specs.shard(name, mesh.size(specs.mappings[name])) for name in names}
        for place, names in mesh.held(list(specs.mappings)).items()
    }
    groups = mesh.groups()
    of_rank = {axis: {rank: tuple(group) for group in groups[axis] for rank in group} for axis in (Axis.TP, Axis.ETP)}
    for rank in range(mesh.world):
        yield RankReport(held[mesh.place(rank)], {axis: of_rank[axis][rank] for axis in of_rank})


def _supposed_state(bundles: Sequence[BundlePlan], recipe: Recipe | None) -> QuantState:
    """The state of a model calibrated with ModelOpt's presets, with an amax of 1 everywhere."""
    amax, formats = dict[str, torch.Tensor](), dict[str, str]()
    parts = (part for bundle in bundles for part in bundle.parts) if recipe is not None else ()
    for part in parts:
        if any(name in part.name for name in _NEVER_QUANTIZED):
            continue
        for name, spec in part.tensors.items():
            module = module_of(name)
            linear = name.endswith(".weight") and len(spec.shape) == 2
            scheme = recipe.scheme_of(module, None) if recipe is not None and linear else None
            if scheme is None:
                continue
            formats[module] = scheme.format
            if scheme.needs_weight_amax:
                amax[module + WEIGHT_QUANTIZER] = torch.ones(())
            if scheme.needs_input_amax:
                amax[module + INPUT_QUANTIZER] = torch.ones(())
    return QuantState(amax=amax, formats=formats)


def _nothing(needed: Sequence[BundlePlan]) -> Iterator[Bundle]:
    del needed
    yield from ()
