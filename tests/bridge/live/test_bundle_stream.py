"""Any mesh gives the same bundles: each Hugging Face tensor once, and a shard travels to its owner only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amaxbridge.bridge.plan.export_plan import plan_export
from amaxbridge.mappings.errors import MappingError, UnmappedParameterError
from amaxbridge.mappings.ranks import LOCAL, Axis, Ranks, run_threads
from benchmarks.meshes import Mesh, Model, as_parameters
from tests.support import mesh_exports
from tests.support.launcher import Launcher
from tests.support.mesh_exports import DENSE, as_lists, export

MESHES = [
    Mesh(tp=2),
    Mesh(tp=4),
    Mesh(pp=2),
    Mesh(tp=2, dp=2),
    Mesh(tp=2, pp=2),
    Mesh(dp=2, ep=2),
    Mesh(tp=2, dp=2, ep=2),
    Mesh(tp=2, dp=2, ep=4),
    Mesh(tp=2, dp=2, etp=2, ep=2),
    Mesh(tp=2, dp=2, etp=4),
    Mesh(tp=2, dp=4, pp=2, ep=2, etp=2),
]


def together(exports: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for owned, _ in exports:
        assert merged.keys().isdisjoint(owned), "a tensor with two owners"
        merged |= owned
    return merged


@settings(max_examples=25, deadline=None)
@given(mesh=st.sampled_from(MESHES), experts=st.sampled_from([0, 4, 8]), bucket=st.sampled_from([1, 3000, 1 << 20]))
def test_every_mesh_exports_the_model(mesh: Mesh, experts: int, bucket: int) -> None:
    """Values come from a hash of the Hugging Face name, so a wrong layer, expert or shard shows."""
    model = Model(heads=8, groups=2, experts=experts)
    merged = together(run_threads(mesh.world, lambda ranks: export(ranks, model, mesh, bucket), mesh.groups()))
    assert merged.keys() == export(LOCAL, model, Mesh())[0].keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, model.tensor(name)), name


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_work_is_spread_and_nothing_moves_that_need_not(mesh: Mesh) -> None:
    model = Model(layers=8, heads=8, groups=4, experts=8)
    exports = run_threads(mesh.world, lambda ranks: export(ranks, model, mesh), mesh.groups())
    whole = sum(tensor.nbytes for tensor in together(exports).values())
    shares = [sum(tensor.nbytes for tensor in owned.values()) for owned, _ in exports]
    assert max(shares) < 1.5 * whole / mesh.world, "each rank owns about its share, data-parallel replicas too"
    for (_, received), share in zip(exports, shares, strict=True):
        width = max(mesh.tp, mesh.etp)
        assert received <= 1.05 * share * (width - 1) / width, "a rank receives what it joins, less its own shard"


def test_threads_and_processes_give_the_same_bytes(launch: Launcher, tmp_path: Path) -> None:
    mesh, model = mesh_exports.ON_PROCESSES
    by_rank = launch.results(mesh_exports.on_processes, tmp_path, processes=mesh.world)
    threads = run_threads(mesh.world, lambda ranks: as_lists(export(ranks, model, mesh)), mesh.groups())
    assert len(threads) == 4
    assert by_rank == threads


class TestProblemsAreFoundOnEveryRank:
    """Before a byte moves, with the same message everywhere, so that no rank waits for another."""

    def messages(self, spoil: Any) -> list[str]:
        mesh, model = Mesh(tp=2), Model()

        def on_rank(ranks: Ranks) -> str:
            tensors = model.parameters(mesh, ranks.rank(Axis.WORLD), DENSE)
            spoil(ranks.rank(Axis.WORLD), tensors)
            with pytest.raises(MappingError) as raised:
                plan_export(as_parameters(tensors), DENSE, model.config, ranks, skip=frozenset())
            return f"{type(raised.value).__name__}: {raised.value}"

        return run_threads(2, on_rank, mesh.groups())

    def test_a_parameter_without_a_mapping_on_one_rank(self) -> None:
        def spoil(rank: int, tensors: dict[str, Tensor]) -> None:
            if rank == 1:
                tensors["decoder.layers.0.strange.weight"] = torch.ones(1)

        first, second = self.messages(spoil)
        assert first == second
        assert first.startswith(UnmappedParameterError.__name__)
        assert "decoder.layers.0.strange.weight" in first

    def test_shards_that_differ(self) -> None:
        name = "decoder.layers.1.mlp.linear_fc2.weight"

        def spoil(rank: int, tensors: dict[str, Tensor]) -> None:
            tensors[name] = tensors[name][:, : 16 + 16 * rank]

        first, second = self.messages(spoil)
        assert first == second
        assert name in first
        assert "rank 0: [32, 16] bfloat16, rank 1: [32, 32] bfloat16" in first

    def test_every_shape_that_does_not_fit_is_named(self) -> None:
        def spoil(rank: int, tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if "linear_qkv" in name]:
                tensors[name] = tensors[name][:7]

        first, second = self.messages(spoil)
        assert first == second
        assert "2 parameters do not fit" in first
        assert first.count("linear_qkv.weight: 2 shard(s) of tp with shapes [7, 32], [7, 32] do not make") == 2
