"""What an export moves: bytes received and memory on top, per rank, beside the naive way. `make bench-traffic`.

Real gloo processes, each with its shards of a bf16 decoder; the bundles are joined and dropped, nothing is written. The
naive way is the usual one: every rank gathers every parameter and receives those of the other stages and experts, so
that each ends with the whole model passing through it.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from amaxbridge.bridge.live.bundle_stream import stream_bundles
from amaxbridge.bridge.live.process_ranks import ProcessRanks
from amaxbridge.bridge.plan.export_plan import plan_export
from amaxbridge.mappings.families import family_of
from amaxbridge.mappings.ranks import Axis, Ranks
from benchmarks.meshes import Mesh, Model, as_parameters, process_groups

DENSE = Model(layers=8, hidden=1024, ffn=4096, heads=16, groups=4, head_dim=64, vocab=32_000)
MOE = Model(layers=4, hidden=1024, ffn=512, heads=16, groups=4, head_dim=64, vocab=32_000, experts=32)
CASES = [
    ("dense", DENSE, Mesh(tp=2)),
    ("dense", DENSE, Mesh(tp=4)),
    ("dense", DENSE, Mesh(tp=2, dp=2)),
    ("dense", DENSE, Mesh(tp=2, pp=2)),
    ("MoE", MOE, Mesh(dp=2, ep=2)),
    ("MoE", MOE, Mesh(dp=4, ep=4)),
    ("MoE", MOE, Mesh(tp=2, dp=2, ep=2, etp=2)),
]
REGISTRIES = {
    "dense": family_of({"architectures": ["Qwen3ForCausalLM"]}).registry,
    "MoE": family_of({"architectures": ["Qwen3MoeForCausalLM"]}).registry,
}


class CountingRanks:
    """Any `Ranks`, with the bytes counted that come from other ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.received = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)

    def all_to_all(self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        return self.begin_all_to_all(axis, data, sent, received)()

    def begin_all_to_all(
        self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int], into: Tensor | None = None
    ) -> Callable[[], list[Tensor]]:
        self.received += sum(received) - received[self._ranks.rank(axis)]
        return self._ranks.begin_all_to_all(axis, data, sent, received, into)

    def all_gather(self, axis: Axis, tensor: Tensor) -> list[Tensor]:
        self.received += (self._ranks.size(axis) - 1) * tensor.nbytes
        return self._ranks.all_gather(axis, tensor)


def export(ranks: Ranks, model: Model, kind: str, tensors: dict[str, Tensor]) -> None:
    """Exports as `bridge.auto` does, without quantizing and writing."""
    registry = REGISTRIES[kind]
    plan = plan_export(as_parameters(tensors), registry, model.config, ranks, skip=frozenset())
    for _ in stream_bundles(plan, tensors, model.config, ranks):
        pass


def naive(ranks: Ranks, model: Model, kind: str, tensors: dict[str, Tensor]) -> None:
    """Every rank receives every parameter: gathered in its own group, sent around among stages and expert blocks."""
    registry = REGISTRIES[kind]
    for name in sorted({name for names in ranks.all_gather_object(Axis.WORLD, list(tensors)) for name in names}):
        mapping = registry.megatron_to_hf_lookup(name)
        assert mapping is not None
        shards = None
        if name in tensors:
            shards = ranks.all_gather(mapping.axis, tensors[name]) if mapping.shard_dim is not None else [tensors[name]]
        for axis in (Axis.EP, Axis.PP):
            shards = _share(ranks, axis, shards)
        if shards is not None:
            mapping.join(shards, model.config)


def _share(ranks: Ranks, axis: Axis, shards: list[Tensor] | None) -> list[Tensor] | None:
    """Sends one rank's tensor to all ranks of the axis."""
    held = ranks.all_gather_object(axis, shards and [(shard.shape, shard.dtype) for shard in shards])
    source = next((rank for rank, specs in enumerate(held) if specs), None)
    if source is None or all(held):
        return shards
    nbytes = [shape.numel() * dtype.itemsize for shape, dtype in held[source]]
    lacking = [sum(nbytes) * (not specs) for specs in held]
    sends = ranks.rank(axis) == source and shards is not None
    pieces = [shard.contiguous().reshape(-1).view(torch.uint8) for shard in shards or []]
    data = torch.cat(pieces * sum(map(bool, lacking))) if sends else torch.empty(0, dtype=torch.uint8)
    comes = [lacking[ranks.rank(axis)] * (rank == source) for rank in range(len(held))]
    received = ranks.all_to_all(axis, data, lacking if sends else [0] * len(held), comes)
    if shards:
        return shards
    parts = received[source].split(nbytes)
    return [part.view(dtype).reshape(shape) for part, (shape, dtype) in zip(parts, held[source], strict=True)]


def measure(rank: int, store: str, kind: str, model: Model, mesh: Mesh, results: Any) -> None:
    """One process of one case: both ways, bytes received and peak memory beyond what the shards take."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=mesh.world)
    groups = process_groups(mesh, rank)
    _warm_up(kind, mesh, rank, groups)
    tensors = model.parameters(mesh, rank, REGISTRIES[kind])
    figures = []
    for way in (export, naive):
        ranks = CountingRanks(ProcessRanks(groups))
        dist.barrier()
        peak = _peak_memory(lambda way=way, ranks=ranks: way(ranks, model, kind, tensors))  # type: ignore[misc]
        figures.append((ranks.received, peak))
    results.put((rank, sum(tensor.nbytes for tensor in tensors.values()), figures))
    dist.barrier()
    dist.destroy_process_group()


def _warm_up(kind: str, mesh: Mesh, rank: int, groups: dict[Axis, dist.ProcessGroup]) -> None:
    """Both ways once on a tiny model, so that what the libraries load on first use is not measured."""
    tiny = Model(heads=8, groups=4, experts=4 if kind == "MoE" else 0)
    for way in (export, naive):
        way(ProcessRanks(groups), tiny, kind, tiny.parameters(mesh, rank, REGISTRIES[kind]))


def _peak_memory(work: Callable[[], None]) -> int:
    """Bytes by which the resident set grew at its highest while `work` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run(kind: str, model: Model, mesh: Mesh) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """The figures of one case's processes, in rank order."""
    results = mp.get_context("spawn").SimpleQueue()
    with TemporaryDirectory() as directory:
        arguments = (os.path.join(directory, "store"), kind, model, mesh, results)
        processes = mp.spawn(measure, arguments, nprocs=mesh.world, join=False)
        found = [results.get() for _ in range(mesh.world)]
        processes.join()
    return sorted(found)


def rows() -> Iterator[str]:
    yield "| model | mesh | per rank: shards | received | naive | peak memory | naive |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for kind, model, mesh in CASES:
        found = run(kind, model, mesh)
        shape = " ".join(f"{name.upper()}={size}" for name, size in vars(mesh).items() if size > 1)
        columns = [[held for _, held, _ in found]]
        for index in (0, 1):
            columns += [[figures[way][index] for _, _, figures in found] for way in (0, 1)]
        cells = " | ".join(f"{max(column) / 2**20:.0f} MiB" for column in columns)
        yield f"| {kind} | {shape} | {cells} |"


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
