"""The seam to the other ranks: everything that a conversion may ask of them.

`Ranks` is a small protocol on the axes of a Megatron mesh. Three implementations keep the rest of the program
free of torch.distributed: `LocalRanks` (one process), `ThreadRanks` (a rank is a thread: unit tests run real
multi-rank code without processes) and `bridge.live.process_ranks.ProcessRanks` (torch.distributed process groups).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor


class Axis(StrEnum):
    """An axis of the mesh that Megatron spreads a model over; WORLD is every rank."""

    TP = "tp"
    ETP = "etp"
    EP = "ep"
    PP = "pp"
    DP = "dp"
    WORLD = "world"


class Ranks(Protocol):
    """What one rank may ask of the others along an axis. Calls are collective unless they say otherwise."""

    def members(self, axis: Axis) -> tuple[int, ...]:
        """World ranks of this rank's group along `axis`, in rank order. Not collective."""

    def rank(self, axis: Axis) -> int:
        """Position of this rank in its group along `axis`. Not collective."""

    def size(self, axis: Axis) -> int:
        """Number of ranks in this rank's group along `axis`. Not collective."""

    def all_to_all(self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        """Sends a slice of `data` to each rank of the group; returns the slices received, in rank order.

        Args:
            data: one-dimensional uint8: the slices, one after the other.
            sent: length of the slice for each rank.
            received: length of the slice from each rank; the ranks must agree on it beforehand.
        """

    def begin_all_to_all(
        self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int], into: Tensor | None = None
    ) -> Callable[[], list[Tensor]]:
        """Begins an `all_to_all`, and returns what waits for its end and returns the slices.

        Args:
            into: memory for the slices; None for new. `data` and `into` must be left alone meanwhile.
        """

    def all_gather(self, axis: Axis, tensor: Tensor) -> list[Tensor]:
        """The group's tensors in rank order, on every rank of the group. Shapes are equal."""

    def all_reduce_max(self, axis: Axis, tensor: Tensor) -> Tensor:
        """The element-wise maximum over the group. `tensor` is unchanged."""

    def all_gather_object(self, axis: Axis, value: Any) -> list[Any]:
        """The group's picklable objects in rank order, on every rank of the group."""


class LocalRanks:
    """One process, alone on every axis."""

    def members(self, axis: Axis) -> tuple[int, ...]:
        return (0,)

    def rank(self, axis: Axis) -> int:
        return 0

    def size(self, axis: Axis) -> int:
        return 1

    def all_to_all(self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        return [data]

    def begin_all_to_all(
        self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int], into: Tensor | None = None
    ) -> Callable[[], list[Tensor]]:
        return lambda: [data]

    def all_gather(self, axis: Axis, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def all_reduce_max(self, axis: Axis, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def all_gather_object(self, axis: Axis, value: Any) -> list[Any]:
        return [value]


LOCAL = LocalRanks()


class ThreadRanks:
    """A rank that is a thread. `run_threads` starts a whole mesh of them in one process.

    Args:
        rank: this thread's world rank.
        groups: for each axis the groups of world ranks, each in rank order. Other axes have size 1.
        exchange: shared by all threads of the run; see `run_threads`.
    """

    def __init__(self, rank: int, groups: Mapping[Axis, Sequence[Sequence[int]]], exchange: "_Exchange") -> None:
        self._world_rank = rank
        self._exchange = exchange
        self._members = {
            axis: next((tuple(group) for group in groups.get(axis, ()) if rank in group), (rank,)) for axis in Axis
        }

    def members(self, axis: Axis) -> tuple[int, ...]:
        return self._members[axis]

    def rank(self, axis: Axis) -> int:
        return self._members[axis].index(self._world_rank)

    def size(self, axis: Axis) -> int:
        return len(self._members[axis])

    def all_to_all(self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        pieces = self.all_gather_object(axis, data.split(list(sent)))
        mine = [piece[self.rank(axis)].clone() for piece in pieces]
        if (lengths := [piece.numel() for piece in mine]) != list(received):
            raise ValueError(f"rank {self._world_rank} expects {list(received)} bytes and is sent {lengths}")
        return mine

    def begin_all_to_all(
        self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int], into: Tensor | None = None
    ) -> Callable[[], list[Tensor]]:
        slices = self.all_to_all(axis, data, sent, received)
        if into is not None:
            torch.cat(slices, out=into[: sum(received)])
            slices = list(into[: sum(received)].split(list(received)))
        return lambda: slices

    def all_gather(self, axis: Axis, tensor: Tensor) -> list[Tensor]:
        tensors: list[Tensor] = self.all_gather_object(axis, tensor)
        shapes = {(tuple(t.shape), t.dtype) for t in tensors}
        if len(shapes) != 1:
            raise ValueError(f"ranks {self.members(axis)} gather tensors of different shapes or dtypes: {shapes}")
        return tensors

    def all_reduce_max(self, axis: Axis, tensor: Tensor) -> Tensor:
        result, *others = self.all_gather(axis, tensor)
        for other in others:
            result = result.maximum(other)
        return result.clone()

    def all_gather_object(self, axis: Axis, value: Any) -> list[Any]:
        return self._exchange.all_gather(self._members[axis], self._world_rank, value)


class _Exchange:
    """The meeting point of one run's threads: a barrier and a board for each group."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._meetings: dict[tuple[int, ...], tuple[threading.Barrier, dict[int, Any]]] = {}

    def all_gather(self, group: tuple[int, ...], rank: int, value: Any) -> list[Any]:
        with self._lock:
            if group not in self._meetings:
                self._meetings[group] = threading.Barrier(len(group), timeout=self._timeout), {}
            barrier, board = self._meetings[group]
        board[rank] = value
        barrier.wait()
        values = [board[member] for member in group]
        barrier.wait()
        return values

    def abort(self) -> None:
        with self._lock:
            for barrier, _ in self._meetings.values():
                barrier.abort()


def run_threads[T](
    world_size: int,
    function: Callable[[ThreadRanks], T],
    groups: Mapping[Axis, Sequence[Sequence[int]]],
    *,
    timeout: float = 60.0,
) -> list[T]:
    """Runs `function` once per rank, each in a thread, and returns the results in rank order.

    A rank that raises releases the others from their collectives, and its exception is raised here. A collective
    that some rank never joins fails after `timeout` seconds instead of hanging.
    """
    exchange = _Exchange(timeout)
    meshes = {**groups, Axis.WORLD: [range(world_size)]}

    def run(rank: int) -> T:
        try:
            return function(ThreadRanks(rank, meshes, exchange))
        except BaseException:
            exchange.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
