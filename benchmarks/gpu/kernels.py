"""How fast a GPU quantizes a bf16 weight that is in its memory, as a part of what its memory can do.

    PYTHONPATH=. python3 benchmarks/gpu/kernels.py

The limit is a copy within the same memory, measured in the same run: bytes read plus bytes written. A kernel is counted
with the bytes it must read and write, each once for each pass; `whole` is with what the host does around it, checks
included. Medians. Before anything is timed, the bytes are compared with the CPU's: status 1 if one differs.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from triton.testing import do_bench

from amaxbridge.export.kernels import amax_triton, e2m1_triton, e4m3_triton, mx, nvfp4, scaled
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Blocks, Code

ROWS, COLUMNS = 8192, 28672
MODELOPT = Arithmetic.MODELOPT
FP8 = {"tensor": Blocks(None, None), "channel": Blocks(), "block 128": Blocks(128, 128)}

type Result = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel, and the call of the public function around it.

    Args:
        moved: bytes that the kernel reads and writes, for an element.
    """

    name: str
    moved: float
    kernel: Callable[[Tensor], object]
    whole: Callable[[Tensor], Result]


def main() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    weight = (torch.randn(ROWS, COLUMNS, generator=generator, device="cuda") * 0.02).bfloat16()
    differing = [job.name for job in jobs(0.1) if not agrees(job, weight[:256])]
    limit = copied(weight)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {limit / 1e12:.2f} TB/s\n")
    print(f"| [{ROWS}, {COLUMNS}] bf16 | ms | GB/s of weight | moved GB/s | of a copy | whole, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for job in jobs(weight.abs().max().item()):
        taken = seconds(lambda job=job: job.kernel(weight))
        moved = job.moved * weight.numel() / taken
        whole = whole_seconds(lambda job=job: job.whole(weight))
        print(
            f"| {job.name} | {taken * 1e3:.3f} | {weight.nbytes / taken / 1e9:.0f} | {moved / 1e9:.0f} "
            f"| {moved / limit:.0%} | {whole * 1e3:.3f} |",
            flush=True,
        )
    if differing:
        sys.exit(f"other bytes than on the CPU: {', '.join(differing)}")


def jobs(largest: float) -> Iterator[Job]:
    amax = torch.tensor(largest)
    yield Job("amax of a group", 2, lambda w: amax_triton.tensor_amax([w]), lambda w: (amax_triton.tensor_amax([w]),))
    for arithmetic in Arithmetic:
        yield nvfp4_job(arithmetic, amax)
    for arithmetic in Arithmetic:
        yield Job(
            f"mxfp4, {arithmetic}",
            2 + 1 / 2 + 1 / 32,
            partial(e2m1_triton.quantize_mxfp4, arithmetic=arithmetic),
            partial(mx.quantize_mxfp4, arithmetic=arithmetic),
        )
        yield Job(
            f"mxfp8, {arithmetic}",
            2 + 1 + 1 / 32,
            partial(e4m3_triton.quantize_mxfp8, arithmetic=arithmetic),
            partial(mx.quantize_mxfp8, arithmetic=arithmetic),
        )
    for name, blocks in FP8.items():
        yield fp8_amax_job(name, blocks)
        for arithmetic in Arithmetic:
            yield fp8_job(name, blocks, largest, arithmetic)


def nvfp4_job(arithmetic: Arithmetic, amax: Tensor) -> Job:
    divisor = nvfp4.global_scale(amax, arithmetic=arithmetic, dtype=torch.bfloat16).item()
    factor_2 = (amax / torch.full_like(amax, 2688.0)).item()

    def kernel(weight: Tensor) -> object:
        return e2m1_triton.quantize_nvfp4(
            weight, arithmetic=arithmetic, amax=amax.item(), divisor=divisor, factor_2=factor_2
        )

    def whole(weight: Tensor) -> Result:
        found = nvfp4.quantize(weight, amax, arithmetic=arithmetic)
        return found.packed, found.block_scale, found.global_scale

    return Job(f"nvfp4, {arithmetic}", 2 + 1 / 2 + 1 / 16, kernel, whole)


def fp8_amax_job(name: str, blocks: Blocks) -> Job:
    def kernel(weight: Tensor) -> object:
        return e4m3_triton.largest(weight, *blocks.size(weight), blocks.shape(*weight.shape))

    return Job(f"fp8 {name}, amax", 2, kernel, lambda w: (scaled.largest(w, blocks),))


def fp8_job(name: str, blocks: Blocks, largest: float, arithmetic: Arithmetic) -> Job:
    """The pass that encodes; where no amax is calibrated, `whole` has the pass before it, for the scales."""

    def amax(weight: Tensor) -> Tensor:
        return torch.full(blocks.shape(*weight.shape), largest, device=weight.device)

    def kernel(weight: Tensor) -> object:
        factor = amax(weight) / 448
        return e4m3_triton.encode(weight, factor, *blocks.size(weight), arithmetic)

    def whole(weight: Tensor) -> Result:
        found = scaled.quantize(weight, Code.E4M3, blocks, amax=amax(weight) if arithmetic is MODELOPT else None)
        return found.codes, found.scale

    return Job(f"fp8 {name}, {arithmetic}", 3, kernel, whole)


def agrees(job: Job, weight: Tensor) -> bool:
    """True if the GPU gives the CPU's bytes. The group amax has no public function, so it is compared here."""
    if job.name == "amax of a group":
        return bool(amax_triton.tensor_amax([weight]) == weight.abs().max())
    found, expected = job.whole(weight), job.whole(weight.cpu())
    as_bytes = [[each.cpu().flatten().view(torch.uint8) for each in result] for result in (found, expected)]
    return all(torch.equal(one, other) for one, other in zip(*as_bytes, strict=True))


def copied(weight: Tensor) -> float:
    """Bytes per second, read plus written, of a copy within GPU memory."""
    copy = torch.empty_like(weight)
    return 2 * weight.nbytes / seconds(lambda: copy.copy_(weight))


def seconds(job: Callable[[], object]) -> float:
    """Median GPU time in seconds."""
    return do_bench(job, warmup=50, rep=300, return_mode="median") / 1e3


def whole_seconds(job: Callable[[], object], runs: int = 15) -> float:
    """Median wall time in seconds, to the end of the last kernel."""
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        job()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
