"""Reading, quantizing and writing at the same time: threads that each take a bundle through all three.

While one thread waits for the disk or the GPU another computes, since none of these holds Python's lock: so the work
overlaps without queues between stages, and what is in memory is one buffer for each thread. A fused group that fits
the buffer is read once; a larger one is gone through in parts, twice where its amax must be measured first. On a GPU,
a thread has a stream of its own and its buffer is pinned; threads take the GPUs in turn.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.rows import Part, Rows, WholeTensor
from export.safetensors_file import PART_BYTES, StoredTensor
from export.source import SourceBundle
from mappings.tensors import TensorSpec

_MEMORY = 64 << 20  # bytes of the buffer of each thread
_ALIGNMENT = 64


class Worker:
    """What a thread has for itself: a device, a stream, a buffer to read into."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.memory = torch.empty(_MEMORY, dtype=torch.uint8, pin_memory=self.cuda)
        self.part = self.memory if self.cuda else self.memory[:PART_BYTES]

    def prepare(self, tensors: Mapping[str, Rows], quantized: Callable[[str], bool]) -> dict[str, Rows]:
        """The tensors of a bundle, so that they are read into this worker's buffer; weights that are quantized come
        to its device.
        """
        weights = {name: rows for name, rows in tensors.items() if quantized(name)}
        stored = {name: rows for name, rows in weights.items() if isinstance(rows, StoredTensor)}
        held: dict[str, Rows] = {}
        if sum(_aligned(rows.spec.nbytes) for rows in stored.values()) <= len(self.memory):
            at = 0
            for name, rows in stored.items():
                held[name] = WholeTensor(self.moved(rows.read(self.memory[at:])))
                at += _aligned(rows.spec.nbytes)
        return {name: held.get(name) or _Buffered(rows, self, moves=name in weights) for name, rows in tensors.items()}

    def moved(self, rows: Tensor) -> Tensor:
        """Rows on the worker's device; the buffer can be used again."""
        if not self.cuda:
            return rows
        assert self.stream is not None
        there = rows.to(self.device, non_blocking=True)
        self.stream.synchronize()
        return there

    def at_work(self) -> Any:
        """The context in which its thread works."""
        return torch.cuda.stream(self.stream) if self.cuda else nullcontext()


@dataclass(frozen=True, slots=True)
class _Buffered:
    """Rows that come through a worker's buffer."""

    source: Rows
    worker: Worker
    moves: bool

    @property
    def spec(self) -> TensorSpec:
        return self.source.spec

    def parts(self, step: int = 1) -> Iterator[Part]:
        if isinstance(self.source, StoredTensor):
            parts = self.source.parts(step, self.worker.part)
        else:
            parts = self.source.parts(step)
        for first, rows in parts:
            yield Part(first, self.worker.moved(rows) if self.moves else rows)


def run(
    bundles: Sequence[SourceBundle],
    make: Callable[[SourceBundle, Worker], None],
    *,
    workers: int,
    devices: Sequence[torch.device],
) -> None:
    """Makes all bundles, in about their order; the first error ends it, and so does Ctrl-C, after the bundles in hand.

    Args:
        workers: threads.
        devices: taken in turn by the threads.
    """
    remaining, mutex, stopped = iter(bundles), threading.Lock(), threading.Event()

    def work(number: int) -> None:
        worker = Worker(devices[number % len(devices)])
        with worker.at_work():
            while not stopped.is_set():
                with mutex:
                    bundle = next(remaining, None)
                if bundle is None:
                    return
                make(bundle, worker)

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException:
            stopped.set()
            raise

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // workers))  # torch's own, of each worker
    try:
        with ThreadPoolExecutor(workers, "worker") as pool:
            try:
                for future in [pool.submit(guarded, number) for number in range(workers)]:
                    future.result()
            finally:
                stopped.set()
    finally:
        torch.set_num_threads(threads)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGNMENT
