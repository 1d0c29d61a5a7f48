"""Reading, quantizing and writing in parallel: each thread takes a bundle through all three.

While one thread waits for the disk or the GPU, another computes, since none of these holds the interpreter lock. So the
work overlaps without queues between stages, and memory holds only the chunk that each thread works on.

On a CPU, weights are read in the mapped file. For a GPU, each thread has a stream and a pinned buffer to read into. A
fused group that fits the buffer is transferred once, a larger one in chunks, and twice if its amax must be measured
first. Threads are dealt to the GPUs in turn.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.disk.row_chunks import Part, Rows, WholeTensor
from amaxbridge.export.disk.safetensors_file import StoredTensor
from amaxbridge.export.model_free.shard_plan import ShardPlan
from amaxbridge.export.model_free.source_bundles import SourceBundle
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.output.finished_directory import BundleWriter
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.tensors import TensorSpec

_MEMORY = 64 << 20  # bytes of each thread's buffer
_ALIGNMENT = 64
_WORKERS_OF_A_GPU = 8


class Worker:
    """The resources of one thread: a device, and for a GPU a stream, a pinned buffer and its counterpart there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = _MEMORY if self.stream else 0
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        self._there = torch.empty(size, dtype=torch.uint8, device=device)
        self._back = torch.empty(size // 2, dtype=torch.uint8, pin_memory=self.stream is not None)

    def prepare(self, tensors: Mapping[str, Rows], quantized: Callable[[str], bool]) -> dict[str, Rows]:
        """The tensors of a bundle; weights to be quantized are moved to the worker's device."""
        moving = {name: rows for name, rows in tensors.items() if self.stream and quantized(name)}
        held: dict[str, Rows] = {}
        stored = {name: rows for name, rows in moving.items() if isinstance(rows, StoredTensor)}
        if sum(_aligned(rows.spec.nbytes) for rows in stored.values()) <= len(self.memory):
            at = 0
            for name, rows in stored.items():
                held[name] = WholeTensor(self.moved(rows.read(self.memory[at:]), at))
                at += _aligned(rows.spec.nbytes)
        return {**tensors, **{name: _Moving(rows, self) for name, rows in moving.items()}, **held}

    def moved(self, rows: Tensor, at: int = 0) -> Tensor:
        """Copies rows to memory of their own on the worker's GPU; the buffer is free again."""
        assert self.stream is not None
        there = self._there[at : at + rows.nbytes]
        if len(there) < rows.nbytes:  # a single row may be larger
            return rows.to(self.device)
        there = there.view(rows.dtype).view(rows.shape)
        there.copy_(rows, non_blocking=True)
        self.stream.synchronize()
        return there

    def fetched(self, rows: Tensor) -> Tensor:
        """Rows on the CPU. Rows from a GPU are valid until the next call."""
        if rows.device.type == "cpu" or rows.nbytes > len(self._back):
            return rows.cpu()
        back = self._back[: rows.nbytes].view(rows.dtype).view(rows.shape)
        back.copy_(rows, non_blocking=True)
        torch.cuda.current_stream(rows.device).synchronize()
        return back

    def at_work(self) -> Any:
        """The context in which the thread works."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()


@dataclass(frozen=True, slots=True)
class _Moving:
    """Rows that are transferred to a worker's GPU through its buffer."""

    source: Rows
    worker: Worker

    @property
    def spec(self) -> TensorSpec:
        return self.source.spec

    def parts(self, step: int = 1, *, again: bool = False) -> Iterator[Part]:
        if isinstance(self.source, StoredTensor):
            parts = self.source.parts(step, self.worker.memory)
        else:
            parts = self.source.parts(step)
        for first, rows in parts:
            yield Part(first, self.worker.moved(rows))


class _Queue:
    """Deals bundles to several threads.

    Each thread has an output file of its own while there are any, in the file's order, because the kernel lets one
    thread at a time write to a file. At the end all threads share the remaining bundles.
    """

    def __init__(self, bundles: Sequence[SourceBundle]) -> None:
        files: dict[str, deque[SourceBundle]] = {}
        for bundle in bundles:
            files.setdefault(bundle.output, deque()).append(bundle)
        self._untouched = deque(files.values())
        self._taken: dict[int, deque[SourceBundle]] = {}
        self._mutex = threading.Lock()

    def take(self, worker: int) -> SourceBundle | None:
        """The next bundle for a worker; None if all are taken."""
        with self._mutex:
            if not self._taken.get(worker):
                others = max(self._taken.values(), key=len, default=deque[SourceBundle]())
                self._taken[worker] = self._untouched.popleft() if self._untouched else others
            return self._taken[worker].popleft() if self._taken[worker] else None


def run(
    bundles: Sequence[SourceBundle],
    make: Callable[[SourceBundle, Worker], None],
    *,
    workers: int,
    devices: Sequence[torch.device],
) -> None:
    """Makes all bundles. The first error, or Ctrl-C, ends it after the bundles in progress.

    Args:
        workers: number of threads.
        devices: devices, dealt to the threads in turn.
    """
    queue, stopped = _Queue(bundles), threading.Event()

    def work(number: int) -> None:
        worker = Worker(devices[number % len(devices)])
        with worker.at_work():
            while not stopped.is_set() and (bundle := queue.take(number)) is not None:
                make(bundle, worker)

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException:
            stopped.set()
            raise

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // workers))  # torch's own threads, of each worker
    try:
        with ThreadPoolExecutor(workers, "worker") as pool:
            try:
                for future in [pool.submit(guarded, number) for number in range(workers)]:
                    future.result()
            finally:
                stopped.set()
    finally:
        torch.set_num_threads(threads)
        torch.cuda.empty_cache()  # each stream has a cache of its own, which no later run would reuse


def write_bundles(
    plan: ShardPlan,
    writer: BundleWriter,
    done: Collection[str] = (),
    workers: int = 1,
    *,
    devices: Sequence[torch.device],
) -> None:
    """Writes the bundles of a plan that are not in `done`."""
    needed = [bundle for bundle in plan.bundles if bundle.key not in done]

    def make(bundle: SourceBundle, worker: Worker) -> None:
        tensors = worker.prepare(bundle.load(), plan.finalizer.is_quantized)
        writer.write(Bundle(tensors, plan.block_amax(bundle), bundle.key), worker.fetched)

    run(needed, make, workers=max(1, min(workers, len(needed))), devices=devices)


def devices_of(wanted: str | torch.device | Sequence[str | torch.device] | None) -> list[torch.device]:
    """The devices to quantize on: the given one, else all GPUs, else the CPU.

    Raises:
        UsageError: there is no such device.
    """
    count = torch.cuda.device_count()
    if wanted is None:
        return [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]
    several = [wanted] if isinstance(wanted, str | torch.device) else list(wanted)
    try:
        devices = [torch.device(each) for each in several]
    except RuntimeError as error:
        raise UsageError(f"unknown device={wanted}: use cpu, cuda or cuda:N") from error
    if any(device.type == "cuda" and (device.index or 0) >= count for device in devices):
        raise UsageError(f"device={wanted}: torch finds {count} GPUs here; omit device=, or use device=cpu")
    return devices


def default_workers(device: str | torch.device | None = None) -> int:
    """The number of threads that keeps the machine busy: one for each core, or several for each GPU."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return min(cores(), gpus * _WORKERS_OF_A_GPU) if gpus else cores()


def cores() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGNMENT
