"""Cases in which ranks that are threads and ranks that are processes must agree."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from amaxbridge.bridge.live.process_ranks import ProcessRanks
from amaxbridge.mappings.ranks import Axis, Ranks

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
        memory, expected = torch.full((64,), 99, dtype=torch.uint8), [origin + mine for origin in range(size)]
        wait = ranks.begin_all_to_all(axis, data, sent, expected, memory)
        results.append([part.tolist() for part in wait()] == results[-1])
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


def on_processes(rank: int) -> list[Any]:
    """The results of all cases on one of four processes."""
    mine = {}  # new_group is collective: every rank makes every group, in the same order
    for axis, members in ((Axis.TP, TP), (Axis.EP, EP)):
        for ids in members:
            group = dist.new_group(ids)
            if rank in ids:
                mine[axis] = group
    return [case(ProcessRanks(mine)) for case in CASES]
