"""One run of a program under measurement, in a process of its own: prints seconds, CPU seconds and memory as JSON.

    python measured.py ours|peer|disk SOURCE TARGET SCHEME WORKERS

`ours` and `peer` are a call of `model_free_ptq`, from arguments to a directory that is whole; imports come before, what
a call loads or compiles for itself counts. `disk` reads the same bytes and writes as many as TARGET holds, synced.
The peer's environment runs this file too, so it imports nothing of ours at the top.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of a call, and how far it raised the process's peak memory, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, which a child has of its parent
    memory, wall, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "memory": (_status("VmHWM") - memory) / 1e3}


def _status(field: str) -> int:
    """A field of /proc/self/status in kilobytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def ours(source: Path, target: Path, scheme: str, workers: int) -> Callable[[], object]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from amaxbridge.export.model_free.whole_directory import model_free_ptq

    return lambda: model_free_ptq(source, target, scheme, max_workers=workers, device="cpu")


def peer(source: Path, target: Path, scheme: str, workers: int) -> Callable[[], object]:
    sys.path.pop(0)  # this directory, whose kernels.py a library of the peer's would take for a package

    from llmcompressor import model_free_ptq
    from loguru import logger

    logger.remove()
    ignore = ["lm_head", "re:.*embed_tokens$", "re:.*mlp\\.gate$"]
    preset = scheme.upper() + ("A16" if scheme.startswith("mxfp") else "")
    return lambda: model_free_ptq(
        str(source), str(target), scheme=preset, ignore=ignore, max_workers=workers, device="cpu"
    )


def disk(source: Path, target: Path, scheme: str, workers: int) -> Callable[[], object]:
    """The same bytes read, and as many written as the quantized checkpoint has, synced; by two threads."""
    from concurrent.futures import ThreadPoolExecutor

    reads = list(source.glob("*.safetensors"))
    writes = [(path.with_suffix(".copy"), path.stat().st_size) for path in target.glob("*.safetensors")]

    def read(path: Path) -> None:
        buffer = bytearray(8 << 20)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def write(path: Path, size: int) -> None:
        block = os.urandom(8 << 20)
        with open(path, "wb", buffering=0) as file:
            for begin in range(0, size, len(block)):
                file.write(block[: size - begin])
            os.fsync(file.fileno())
        path.unlink()

    def both() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, reads))
            list(pool.map(lambda each: write(*each), writes))

    return both


if __name__ == "__main__":
    program, source, target, scheme, workers = sys.argv[1:]
    make = {"ours": ours, "peer": peer, "disk": disk}[program]
    print(json.dumps(measured(make(Path(source), Path(target), scheme, int(workers)))))
