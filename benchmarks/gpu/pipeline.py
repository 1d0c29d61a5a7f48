"""From directory to directory on one GPU or several, beside what the machine reads, writes and copies in the same run.

    PYTHONPATH=. python3 benchmarks/gpu/pipeline.py [--gigabytes 11] [--workers 4 8 12]

The source is in the page cache. The output is synced, to a disk and to memory (/dev/shm): the disk is often what
limits. Each line is the best of three runs; "busy" is the part of the time in which each GPU computed, and memory is
that of all. First a small checkpoint is quantized on the GPU and on the CPU, and the files must be the same.

Where llm-compressor can be imported, its `model_free_ptq` comes last, once for each number of workers.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoints
import torch

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.model_free.whole_directory import model_free_ptq

BLOCK = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=11.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--peer-workers", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--directory", help="where to work; a temporary directory unless given")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    print(f"{gpus} × {torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        same_as_cpu(Path(directory))
        source = checkpoints.write(Path(directory, "in"), "dense", options.gigabytes, files=4)
        files = list(source.glob("*.safetensors"))
        nbytes = sum(file.stat().st_size for file in files)
        limits(files, nbytes, Path(directory))
        print(
            "\n| scheme | output | workers | GB/s | seconds | GPU memory | busy |\n|---|---|---:|---:|---:|---:|---:|"
        )
        state = calibrated(source)
        runs = [("nvfp4", state), ("nvfp4a16", None), ("mxfp4", None), ("fp8_dynamic", None)]
        for where, target in (("memory", Path("/dev/shm/out")), ("disk", Path(directory, "out"))):
            for scheme, given in runs:
                for workers in options.workers if scheme == "nvfp4a16" else options.workers[1:2]:
                    run = partial(
                        model_free_ptq, source, target, scheme, max_workers=workers, quant_state=given, overwrite=True
                    )
                    row(f"{scheme} | {where} | {workers}", run, target, nbytes)
        peer(source, nbytes, options.peer_workers)


def row(name: str, run: Callable[[], object], target: Path, nbytes: int, runs: int = 3) -> None:
    """Prints a line of the table for a run that writes to `target`."""
    with Watch() as watch:
        seconds = timed(run, runs)
    shutil.rmtree(target)
    torch.cuda.empty_cache()
    busy = ", ".join(f"{each:.0f}%" for each in watch.busy)
    speed = f"{nbytes / seconds / 1e9:.2f} | {seconds:.2f} | {watch.memory / 1e9:.2f} GB | {busy}"
    print(f"| {name} | {speed} |", flush=True)


def peer(source: Path, nbytes: int, workers: Sequence[int]) -> None:
    """The same run by llm-compressor: data-free NVFP4."""
    sys.path[:] = [each for each in sys.path if each != str(Path(__file__).parent)]  # whose kernels.py is theirs too
    try:
        from llmcompressor import model_free_ptq as theirs
    except ImportError as error:
        print(f"llm-compressor is not here: {error}")
        return
    ignore = ["lm_head", "re:.*embed_tokens$"]
    target = Path("/dev/shm/out")
    for count in workers:
        run = partial(theirs, str(source), str(target), "NVFP4A16", ignore=ignore, max_workers=count, device="cuda:0")
        row(f"llm-compressor, nvfp4a16 | memory | {count}", run, target, nbytes, runs=1)


def same_as_cpu(directory: Path) -> None:
    source = checkpoints.write(directory / "small", "moe", 0.7)
    for scheme in ("nvfp4a16", "mxfp4", "fp8_block", "w4a16"):
        for device in ("cpu", "cuda"):
            model_free_ptq(source, directory / device, scheme, max_workers=4, device=device, overwrite=True)
        names = [file.name for file in (directory / "cpu").glob("*.safetensors")]
        _, differ, errors = filecmp.cmpfiles(directory / "cpu", directory / "cuda", names, shallow=False)
        print(f"{scheme}: GPU and CPU wrote {'the same bytes' if not differ + errors else f'other bytes: {differ}'}")
        if differ + errors:
            sys.exit(1)


def calibrated(source: Path) -> QuantState:
    """A state with an amax for every linear of the layers."""
    import json

    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    modules = [name.removesuffix(".weight") for name in weight_map if name.endswith("_proj.weight")]
    amax = {f"{module}.{kind}_quantizer._amax": torch.tensor(0.1) for module in modules for kind in ("weight", "input")}
    return QuantState(amax, dict.fromkeys(modules, "nvfp4"))


def limits(files: list[Path], nbytes: int, directory: Path) -> None:
    """The machine's own limits: reading the files, writing and syncing a third of that, copying to the GPU."""

    def read(file: Path) -> None:
        buffer = bytearray(BLOCK)
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    def read_with(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, files))

    def write() -> None:
        block = os.urandom(BLOCK)
        with open(directory / "written", "wb", buffering=0) as stream:
            for _ in range(nbytes // 3 // BLOCK):
                stream.write(block)
            os.fsync(stream.fileno())

    pinned = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        for _ in range(16):
            there.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    print(f"\nreading, one thread: {nbytes / timed(lambda: read_with(1)) / 1e9:.2f} GB/s")
    print(f"reading, {len(files)} threads: {nbytes / timed(lambda: read_with(len(files))) / 1e9:.2f} GB/s")
    print(f"writing and syncing: {nbytes // 3 / timed(write) / 1e9:.2f} GB/s")
    print(f"to the GPU, pinned: {16 * BLOCK / timed(copy) / 1e9:.2f} GB/s")


class Watch:
    """While it is open, watches how busy the GPUs are and how much memory is in use beyond what was before."""

    def __enter__(self) -> Self:
        self.memory, self._idle, self._stop = 0, gpu_memory(), threading.Event()
        query = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        self._smi = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.memory = max(self.memory, gpu_memory() - self._idle)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._watcher.join()
        self._smi.terminate()
        samples: dict[str, list[float]] = {}
        for line in self._smi.communicate()[0].splitlines():
            gpu, comma, busy = line.partition(",")
            if comma and busy.strip().isdigit():
                samples.setdefault(gpu, []).append(float(busy))
        self.busy = [mean(each) for each in list(samples.values())[: torch.cuda.device_count()]]


def gpu_memory() -> int:
    """Bytes in use on all GPUs."""
    pairs = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    return sum(total - free for free, total in pairs)


def timed(run: Callable[[], object], runs: int = 3) -> float:
    """The best of some runs, in seconds."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


if __name__ == "__main__":
    main()
