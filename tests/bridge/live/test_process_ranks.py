"""The thread ranks and real gloo processes do the same on the same cases."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from amaxbridge.bridge.live.process_ranks import ProcessRanks
from amaxbridge.mappings.ranks import LOCAL, Axis, Ranks, run_threads

TP, EP = [[0, 1], [2, 3]], [[0, 2], [1, 3]]


def geometry(ranks: Ranks) -> Any:
    return [(axis.value, ranks.members(axis), ranks.rank(axis), ranks.size(axis)) for axis in Axis]


def collectives(ranks: Ranks) -> Any:
    me = ranks.rank(Axis.WORLD)
    results: list[Any] = []
    for axis in (Axis.TP, Axis.EP, Axis.PP, Axis.WORLD):
        for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn):
            tensor = torch.full((2, 3), float(me + 1)).to(dtype).t()
            results.append([part.float().tolist() for part in ranks.all_gather(axis, tensor)])
        mine, size = ranks.rank(axis), ranks.size(axis)
        sent = [mine + to for to in range(size)]
        data = torch.cat([torch.full((mine + to,), 10 * mine + to, dtype=torch.uint8) for to in range(size)])
        received = ranks.all_to_all(axis, data, sent, [origin + mine for origin in range(size)])
        results.append([part.tolist() for part in received])
        scalar = torch.tensor(float(me))
        results.append([part.shape for part in ranks.all_gather(axis, scalar)])
        results.append(ranks.all_reduce_max(axis, torch.tensor([me, -me], dtype=torch.float32)).tolist())
        results.append(ranks.all_gather_object(axis, {"rank": me}))
    return results


def input_is_left_alone(ranks: Ranks) -> Any:
    tensor = torch.tensor([float(ranks.rank(Axis.WORLD))])
    ranks.all_reduce_max(Axis.WORLD, tensor)
    return tensor.tolist()


CASES: list[Callable[[Ranks], Any]] = [geometry, collectives, input_is_left_alone]


def _process(rank: int, store: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    mine = {}  # new_group is collective: every rank makes every group, in the same order
    for axis, members in ((Axis.TP, TP), (Axis.EP, EP)):
        for ids in members:
            group = dist.new_group(ids)
            if rank in ids:
                mine[axis] = group
    results.put((rank, [case(ProcessRanks(mine)) for case in CASES]))
    dist.barrier()
    dist.destroy_process_group()


def test_threads_do_as_processes_do(tmp_path: Any) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = mp.spawn(_process, (str(tmp_path / "store"), results), nprocs=4, join=False)
    by_rank = dict(results.get() for _ in range(4))
    processes.join()
    for index, case in enumerate(CASES):
        threads = run_threads(4, case, {Axis.TP: TP, Axis.EP: EP})
        assert [by_rank[rank][index] for rank in range(4)] == threads, case.__name__


@pytest.mark.parametrize("case", CASES)
def test_one_process_is_a_mesh_of_one(case: Callable[[Ranks], Any]) -> None:
    assert [case(LOCAL)] == run_threads(1, case, {})


def test_a_rank_that_fails_releases_the_others() -> None:
    def one_fails(ranks: Ranks) -> None:
        if ranks.rank(Axis.WORLD) == 1:
            raise KeyError("rank 1 found a problem")
        ranks.all_gather_object(Axis.WORLD, None)

    with pytest.raises(KeyError, match="rank 1 found a problem"):
        run_threads(3, one_fails, {})


def test_tensors_that_differ_in_shape_are_refused() -> None:
    def mismatched(ranks: Ranks) -> None:
        ranks.all_gather(Axis.WORLD, torch.zeros(1 + ranks.rank(Axis.WORLD)))

    with pytest.raises(ValueError, match="differ"):
        run_threads(2, mismatched, {})


def test_slices_of_unexpected_lengths_are_refused() -> None:
    """The message has the lengths, not the bytes."""

    def mismatched(ranks: Ranks) -> None:
        ranks.all_to_all(Axis.WORLD, torch.zeros(100_000, dtype=torch.uint8), [60_000, 40_000], [60_000, 50_000])

    message = r"^rank (0|1) expects \[60000, 50000\] bytes and is sent (\[60000, 60000\]|\[40000, 40000\])$"
    with pytest.raises(ValueError, match=message):
        run_threads(2, mismatched, {})
