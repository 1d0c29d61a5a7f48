"""The exchange of shards over NCCL, from GPU memory: the same tensors as on a CPU. Needs two GPUs: `make test-gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from amaxbridge.bridge.live.bundle_stream import stream_bundles
from amaxbridge.bridge.live.process_ranks import ProcessRanks
from amaxbridge.bridge.plan.export_plan import plan_export
from amaxbridge.mappings.families import family_of
from benchmarks.meshes import Mesh, Model, as_parameters, process_groups

MODEL = Model(layers=2, hidden=256, ffn=512, heads=8, groups=2, head_dim=32, vocab=1000, experts=8)
REGISTRY = family_of({"architectures": ["Qwen3MoeForCausalLM"]}).registry


@pytest.mark.parametrize("mesh", [Mesh(tp=2, etp=2), Mesh(dp=2, ep=2), Mesh(tp=2, ep=2)], ids=str)
def test_two_gpus_export_what_a_cpu_does(mesh: Mesh, tmp_path: Path) -> None:
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(_process, (str(tmp_path / "store"), mesh, results), nprocs=2, join=False)
    owned = dict(results.get() for _ in range(2))
    processes.join()
    assert owned[0].keys().isdisjoint(owned[1])
    for tensors in owned.values():
        assert tensors
        for name, data in tensors.items():
            assert data == MODEL.tensor(name).view(torch.uint8).flatten().tolist(), name


def _process(rank: int, store: str, mesh: Mesh, results: Any) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = ProcessRanks(process_groups(mesh, rank))
    tensors = {name: tensor.cuda() for name, tensor in MODEL.parameters(mesh, rank, REGISTRY).items()}
    plan = plan_export(as_parameters(tensors), REGISTRY, MODEL.config, ranks, skip=frozenset())
    owned = {}
    for bundle in stream_bundles(plan, tensors, MODEL.config, ranks):
        for name, rows in bundle.tensors.items():
            ((_, tensor),) = rows.parts()
            assert tensor.is_cuda
            owned[name] = tensor.cpu().view(torch.uint8).flatten().tolist()
    values = ranks.all_reduce_max(next(iter(mesh.groups())), torch.tensor([float(rank)]))
    assert values.device.type == "cpu"
    results.put((rank, owned))
    dist.barrier()
    dist.destroy_process_group()
