"""`Ranks` over torch.distributed process groups. No other file of the program calls torch.distributed.

Gathered tensors travel as bytes, so every dtype passes through every backend.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amaxbridge.mappings.ranks import LOCAL, Axis, Ranks


class ProcessRanks:
    """This process in its groups.

    Args:
        groups: the process group of each axis. WORLD is added; other axes have size 1.
    """

    def __init__(self, groups: Mapping[Axis, dist.ProcessGroup]) -> None:
        world = dist.group.WORLD
        assert world is not None, "torch.distributed is not initialized"
        self._groups = {**groups, Axis.WORLD: world}
        self._device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")

    def members(self, axis: Axis) -> tuple[int, ...]:
        if axis not in self._groups:
            return (dist.get_rank(),)
        return tuple(dist.get_process_group_ranks(self._groups[axis]))

    def rank(self, axis: Axis) -> int:
        return self.members(axis).index(dist.get_rank())

    def size(self, axis: Axis) -> int:
        return len(self.members(axis))

    def all_to_all(self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        return self.begin_all_to_all(axis, data, sent, received)()

    def begin_all_to_all(
        self, axis: Axis, data: Tensor, sent: Sequence[int], received: Sequence[int], into: Tensor | None = None
    ) -> Callable[[], list[Tensor]]:
        if self.size(axis) == 1:
            return lambda: [data]
        if into is None or into.device.type != self._device.type:
            into = torch.empty(sum(received), dtype=torch.uint8, device=self._device)
        arrived, group = into[: sum(received)], self._groups[axis]
        work = dist.all_to_all_single(
            arrived, data.to(self._device), list(received), list(sent), group=group, async_op=True
        )

        assert work is not None, "asynchronous"

        def wait() -> list[Tensor]:
            work.wait()
            return list(arrived.split(list(received)))

        return wait

    def all_gather(self, axis: Axis, tensor: Tensor) -> list[Tensor]:
        if self.size(axis) == 1:
            return [tensor]
        sent = self._as_bytes(tensor)
        parts = [torch.empty_like(sent) for _ in range(self.size(axis))]
        dist.all_gather(parts, sent, group=self._groups[axis])
        return [_from_bytes(part, tensor) for part in parts]

    def all_reduce_max(self, axis: Axis, tensor: Tensor) -> Tensor:
        reduced = tensor.detach().to(self._device, copy=True)
        if self.size(axis) > 1:
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self._groups[axis])
        return reduced.to(tensor.device)

    def all_gather_object(self, axis: Axis, value: Any) -> list[Any]:
        if self.size(axis) == 1:
            return [value]
        values: list[Any] = [None] * self.size(axis)
        try:
            dist.all_gather_object(values, value, group=self._groups[axis])
        except RuntimeError as error:
            error.add_note("Another rank failed (see its message), or did not make this call, as all ranks must")
            raise
        return values

    def _as_bytes(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device).contiguous().reshape(-1).view(torch.uint8)


def world_size() -> int:
    """Number of processes that share the work, as set by `torchrun`; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def world_rank() -> int:
    """Rank of this process, as set by `torchrun`; 0 without it."""
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Opens the default process group, of `torchrun` or of this process alone: NCCL with CUDA, else gloo.

    Does nothing if there is one already.
    """
    if dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def current_ranks() -> Ranks:
    """The ranks of Megatron's parallel state if torch.distributed is initialized, else this process alone."""
    if not dist.is_initialized():
        return LOCAL
    from amaxbridge.bridge.megatron.process_groups import (
        process_ranks,  # here, because Megatron takes many seconds to import
    )

    return process_ranks()


def _from_bytes(data: Tensor, like: Tensor) -> Tensor:
    return data.view(like.dtype).reshape(like.shape)
