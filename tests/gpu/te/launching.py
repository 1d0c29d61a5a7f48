"""Starts a script once for each case: in its own process, or under torchrun where the case has several ranks."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import CASES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Without it Transformer Engine does not load the state of its delayed recipe, a pickle. These are our own."""


def run_cases(script: str, directory: Path, names: Sequence[str], *, jobs: int, gpus: int) -> Iterator[str]:
    """Names of the cases whose process succeeds, as they end; `directory/CASE.log` holds what it printed.

    Args:
        script: a file beside this one; it gets the directory and the case's name.
        jobs: cases at a time.
        gpus: over which processes are spread.
    """

    def run(number: int, name: str) -> str | None:
        begin = time.perf_counter()
        done = _run(script, directory, name, gpu=number % gpus)
        log = directory / f"{name}.{Path(script).stem}.log"
        log.write_text(done.stdout + done.stderr)
        said = (done.stdout.strip().splitlines() or [""])[-1]
        verdict = f"failed, see {log}" if done.returncode else said
        print(f"{name}: {verdict} ({time.perf_counter() - begin:.0f} s)", flush=True)
        return None if done.returncode else name

    with ThreadPoolExecutor(jobs) as pool:
        yield from filter(None, pool.map(run, range(len(names)), names))


def _run(script: str, directory: Path, name: str, *, gpu: int) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", TRUST: "1"}
    command = [sys.executable]
    if CASES[name].processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(CASES[name].processes)]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    words = [*command, str(HERE / script), str(directory), name]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
