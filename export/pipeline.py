"""Reading, quantizing and writing at the same time: threads that each take a bundle through all three.

While one thread waits for the disk or the GPU another computes, since none of these holds Python's lock: so the work
overlaps without queues between stages, and what is in memory is the part of a tensor that each thread has in hand.

On a CPU, weights are looked at in the memory of their file. For a GPU each thread has a stream, and a pinned buffer
that is read into: a fused group that fits it crosses once, a larger one in parts, twice where its amax must be measured
first. Threads take the GPUs in turn.
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
from export.safetensors_file import StoredTensor
from export.source import SourceBundle
from mappings.tensors import TensorSpec

_MEMORY = 64 << 20  # bytes of the buffer of each thread
_ALIGNMENT = 64
_WORKERS_OF_A_GPU = 8


class Worker:
    """What a thread has for itself: a device, and for a GPU a stream and a pinned buffer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.memory = torch.empty(_MEMORY if self.stream else 0, dtype=torch.uint8, pin_memory=self.stream is not None)

    def prepare(self, tensors: Mapping[str, Rows], quantized: Callable[[str], bool]) -> dict[str, Rows]:
        """The tensors of a bundle; weights that are quantized come to the worker's device."""
        moving = {name: rows for name, rows in tensors.items() if self.stream and quantized(name)}
        held: dict[str, Rows] = {}
        stored = {name: rows for name, rows in moving.items() if isinstance(rows, StoredTensor)}
        if sum(_aligned(rows.spec.nbytes) for rows in stored.values()) <= len(self.memory):
            at = 0
            for name, rows in stored.items():
                held[name] = WholeTensor(self.moved(rows.read(self.memory[at:])))
                at += _aligned(rows.spec.nbytes)
        return {**tensors, **{name: _Moving(rows, self) for name, rows in moving.items()}, **held}

    def moved(self, rows: Tensor) -> Tensor:
        """Rows on the worker's device; the buffer can be used again."""
        assert self.stream is not None
        there = rows.to(self.device, non_blocking=True)
        self.stream.synchronize()
        return there

    def at_work(self) -> Any:
        """The context in which its thread works."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()


@dataclass(frozen=True, slots=True)
class _Moving:
    """Rows that go to a worker's GPU, through its buffer."""

    source: Rows
    worker: Worker

    @property
    def spec(self) -> TensorSpec:
        return self.source.spec

    def parts(self, step: int = 1) -> Iterator[Part]:
        if isinstance(self.source, StoredTensor):
            parts = self.source.parts(step, self.worker.memory)
        else:
            parts = self.source.parts(step)
        for first, rows in parts:
            yield Part(first, self.worker.moved(rows))


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


def default_workers(device: str | torch.device | None = None) -> int:
    """As many threads as keep everything busy: one a core, or several a GPU, each with another part of the work."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return min(cores(), gpus * _WORKERS_OF_A_GPU) if gpus else cores()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGNMENT
