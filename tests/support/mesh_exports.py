"""Bundles of a model that is only parameters, as the ranks of any mesh export them."""

from typing import Any

import torch
from torch import Tensor

from amaxbridge.bridge.live.bundle_stream import stream_bundles
from amaxbridge.bridge.live.process_ranks import ProcessRanks
from amaxbridge.bridge.plan.export_plan import plan_export
from amaxbridge.mappings.families import family_of
from amaxbridge.mappings.ranks import Axis, Ranks
from benchmarks.meshes import Mesh, Model, as_parameters, process_groups
from benchmarks.traffic import CountingRanks

DENSE = family_of({"architectures": ["Qwen3ForCausalLM"]}).registry
MOE = family_of({"architectures": ["Qwen3MoeForCausalLM"]}).registry
ON_PROCESSES = Mesh(tp=2, dp=2, ep=2, etp=2), Model(heads=8, groups=2, experts=8)
"""The mesh and the model that `on_processes` exports."""


def export(ranks: Ranks, model: Model, mesh: Mesh, bucket_bytes: int = 1 << 20) -> tuple[dict[str, Tensor], int]:
    """Exports on one rank: the tensors that it owns, and the bytes that it received."""
    registry = MOE if model.experts else DENSE
    tensors = model.parameters(mesh, ranks.rank(Axis.WORLD), registry)
    counting = CountingRanks(ranks)
    plan = plan_export(as_parameters(tensors), registry, model.config, counting, skip=frozenset())
    owned: dict[str, Tensor] = {}
    for bundle in stream_bundles(plan, tensors, model.config, counting, bucket_bytes=bucket_bytes):
        assert owned.keys().isdisjoint(bundle.tensors)
        for name, rows in bundle.tensors.items():
            ((_, owned[name]),) = rows.parts()
    return owned, counting.received


def as_lists(exported: tuple[dict[str, Tensor], int]) -> Any:
    owned, received = exported
    return {name: tensor.view(torch.uint8).tolist() for name, tensor in owned.items()}, received


def on_processes(rank: int) -> Any:
    """The export of one of four processes."""
    mesh, model = ON_PROCESSES
    return as_lists(export(ProcessRanks(process_groups(mesh, rank)), model, mesh))
