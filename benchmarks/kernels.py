"""How fast one core quantizes a bf16 weight, beside llm-compressor and beside reading memory: `make bench-kernels`.

CPU time of one thread, the best of several runs; what is compiled is compiled before. The peer runs in its environment
on the same weight (`peer_kernels.py`), with what its `model_free_ptq` calls for a weight that is in memory.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peer_kernels import best_seconds, bf16_weight
from rich.console import Console
from rich.table import Table
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.schemes.scheme import quantize_tensors

CALIBRATED = GroupAmax(torch.tensor(0.1), torch.tensor(2.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="the python of an environment with llmcompressor")
    peer = parser.parse_args().peer
    torch.set_num_threads(1)
    weight = bf16_weight()
    copy = torch.empty_like(weight)
    theirs: dict[str, float] = {}
    if peer:
        script = Path(__file__).with_name("peer_kernels.py")
        theirs = json.loads(subprocess.run([peer, script], check=True, capture_output=True).stdout.splitlines()[-1])

    table = Table("", "GB/s a core", "llm-compressor", "ratio", title="bf16 bytes read, one core")
    for name, quantize in jobs(weight):
        ours = weight.nbytes / best_seconds(quantize) / 1e9
        preset = name.partition(",")[0].upper()
        known = theirs.get(preset if preset in theirs else preset + "A16")
        table.add_row(name, f"{ours:.2f}", f"{known:.3f}" if known else "", f"{ours / known:.0f}×" if known else "")
    limits = {
        "reading (sum of all bits)": lambda: weight.view(torch.int64).sum(),
        "copying": lambda: copy.copy_(weight),
    }
    for name, touch in limits.items():
        table.add_row(name, f"{weight.nbytes / best_seconds(touch) / 1e9:.2f}", "", "")
    console = Console()
    console.print(table)
    console.print(f"two threads, nvfp4 calibrated: {two_threads(weight):.1f} GB/s of wall time")


def jobs(weight: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    for name, scheme in SCHEMES.items():
        if scheme.format:
            yield f"{name}, calibrated", lambda scheme=scheme: list(quantize_tensors(scheme, {"m": weight}, CALIBRATED))
        if not scheme.needs_input_amax:
            yield name, lambda scheme=scheme: list(quantize_tensors(scheme, {"m": weight}))


def two_threads(weight: Tensor) -> float:
    """GB/s of two threads, wall time, the best of five runs; they share no lock."""
    copies, rounds, times = (weight.clone(), weight.clone()), 10, []

    def quantize(copy: Tensor) -> None:
        for _ in range(rounds):
            list(quantize_tensors(SCHEMES["nvfp4"], {"m": copy}, CALIBRATED))

    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(quantize, copies))
            times.append(time.perf_counter() - begin)
    return 2 * rounds * weight.nbytes / min(times) / 1e9


if __name__ == "__main__":
    main()
