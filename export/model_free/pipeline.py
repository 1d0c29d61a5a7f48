"""Reading, quantizing and writing at the same time: threads that each take a bundle through all three.

While one thread waits for the disk or the GPU another computes, since none of these holds Python's lock: so the work
overlaps without queues between stages, and what is in memory is the part of a tensor that each thread has in hand.

On a CPU, weights are looked at in the memory of their file. For a GPU each thread has a stream, and a pinned buffer
that is read into: a fused group that fits it crosses once, a larger one in parts, twice where its amax must be measured
first. Threads take the GPUs in turn.
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

_MEMORY = 64 << 20  # bytes of the buffer of each thread
_ALIGNMENT = 64
_WORKERS_OF_A_GPU = 8


class Worker:
    """What a thread has for itself: a device, and for a GPU a stream and a pinned buffer, with its like there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = _MEMORY if self.stream else 0
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        self._there = torch.empty(size, dtype=torch.uint8, device=device)
        self._back = torch.empty(size // 2, dtype=torch.uint8, pin_memory=self.stream is not None)

    def prepare(self, tensors: Mapping[str, Rows], quantized: Callable[[str], bool]) -> dict[str, Rows]:
        """The tensors of a bundle; weights that are quantized come to the worker's device."""
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
        """Rows on the worker's GPU, where they have a place of their own; the buffer can be used again."""
        assert self.stream is not None
        there = self._there[at : at + rows.nbytes]
        if len(there) < rows.nbytes:  # a row that is larger
            return rows.to(self.device)
        there = there.view(rows.dtype).view(rows.shape)
        there.copy_(rows, non_blocking=True)
        self.stream.synchronize()
        return there

    def fetched(self, rows: Tensor) -> Tensor:
        """Rows on the CPU; those from a GPU are valid until the next ones are fetched."""
        if rows.device.type == "cpu" or rows.nbytes > len(self._back):
            return rows.cpu()
        back = self._back[: rows.nbytes].view(rows.dtype).view(rows.shape)
        back.copy_(rows, non_blocking=True)
        torch.cuda.current_stream(rows.device).synchronize()
        return back

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

    def parts(self, step: int = 1, *, again: bool = False) -> Iterator[Part]:
        if isinstance(self.source, StoredTensor):
            parts = self.source.parts(step, self.worker.memory)
        else:
            parts = self.source.parts(step)
        for first, rows in parts:
            yield Part(first, self.worker.moved(rows))


class _Queue:
    """Bundles for several threads: each keeps to an output file of its own while there are any, in the file's order,
    because the kernel lets one thread at a time write to a file. In the end all help with what is left.
    """

    def __init__(self, bundles: Sequence[SourceBundle]) -> None:
        files: dict[str, deque[SourceBundle]] = {}
        for bundle in bundles:
            files.setdefault(bundle.output, deque()).append(bundle)
        self._untouched = deque(files.values())
        self._taken: dict[int, deque[SourceBundle]] = {}
        self._mutex = threading.Lock()

    def take(self, worker: int) -> SourceBundle | None:
        """The next bundle for a worker, None where all are taken."""
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
    """Makes all bundles; the first error ends it, and so does Ctrl-C, after the bundles in hand.

    Args:
        workers: threads.
        devices: taken in turn by the threads.
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
        torch.cuda.empty_cache()  # each stream has a cache of its own, which no other run would find


def write_bundles(
    plan: ShardPlan,
    writer: BundleWriter,
    done: Collection[str] = (),
    workers: int = 1,
    *,
    devices: Sequence[torch.device],
) -> None:
    """Writes the bundles of a plan, but for those that are `done`."""
    needed = [bundle for bundle in plan.bundles if bundle.key not in done]

    def make(bundle: SourceBundle, worker: Worker) -> None:
        tensors = worker.prepare(bundle.load(), plan.finalizer.is_quantized)
        writer.write(Bundle(tensors, plan.block_amax(bundle), bundle.key), worker.fetched)

    run(needed, make, workers=max(1, min(workers, len(needed))), devices=devices)


def devices_of(wanted: str | torch.device | Sequence[str | torch.device] | None) -> list[torch.device]:
    """The devices to quantize on: those wanted, or all GPUs, or the CPU where there is none.

    Raises:
        UsageError: a device that there is not.
    """
    count = torch.cuda.device_count()
    if wanted is None:
        return [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]
    several = [wanted] if isinstance(wanted, str | torch.device) else list(wanted)
    try:
        devices = [torch.device(each) for each in several]
    except RuntimeError as error:
        raise UsageError(f"device={wanted} is none: give cpu, cuda, or cuda:0 and so on") from error
    if any(device.type == "cuda" and (device.index or 0) >= count for device in devices):
        raise UsageError(f"device={wanted}: torch finds {count} GPUs here; leave it out, or give device=cpu")
    return devices


def default_workers(device: str | torch.device | None = None) -> int:
    """As many threads as keep everything busy: one a core, or several a GPU, each with another part of the work."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return min(cores(), gpus * _WORKERS_OF_A_GPU) if gpus else cores()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGNMENT
