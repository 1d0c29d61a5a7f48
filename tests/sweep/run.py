"""`make sweep`: all rows, two at a time, each in a forked process of its own; a table, and the verdicts as JSON.

python -m tests.sweep.run [--types qwen3,llama] [--json FILE] [--markdown FILE] [--processes 2] [--seconds 120]
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.sweep.account import counts_table, faults, fewer_than_committed, write_page
from tests.sweep.architectures import PUBLISHED, Row, rows
from tests.sweep.judge_row import CRASHED, SCHEMES, WRONG, judge, main_json


def sweep(
    chosen: Sequence[Row], *, processes: int, seconds: float, report: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The verdicts on all rows, in their order. `report` gets what there is so far, from time to time."""
    import_once()
    waiting, running = list(enumerate(chosen))[::-1], dict[int, tuple[int, float]]()
    verdicts: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < processes:
                number, row = waiting.pop()
                child = os.fork()
                if child == 0:
                    _become_worker(row, Path(scratch) / f"{number}.json")
                running[child] = number, time.monotonic()
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                for late, (_, started) in running.items():
                    if time.monotonic() - started > seconds:
                        os.kill(late, signal.SIGKILL)
                time.sleep(0.05)
                continue
            number, started = running.pop(child)
            path = Path(scratch) / f"{number}.json"
            if path.exists():
                verdicts[number] = json.loads(path.read_text())
            else:
                verdicts[number] = [
                    _died(chosen[number], scheme, status, time.monotonic() - started) for scheme in SCHEMES
                ]
            _say(verdicts[number], len(verdicts), len(chosen))
            if len(verdicts) % 20 == 0 or len(verdicts) == len(chosen):
                report([verdict for each in sorted(verdicts) for verdict in verdicts[each]])
    return [verdict for number in sorted(verdicts) for verdict in verdicts[number]]


def import_once() -> None:
    """Imports what every worker needs before the first fork."""
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    import tests.sweep.file_oracle
    import tests.sweep.loading_oracle
    import tests.sweep.random_models  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    judge(Row("llama", "LlamaForCausalLM", counted=True), layouts=(PUBLISHED,))  # its lazy imports take seconds


def _become_worker(row: Row, path: Path) -> None:
    status = 1
    with contextlib.suppress(BaseException):
        main_json(row, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        status = 0
    os._exit(status)


def _died(row: Row, scheme: str, status: int, seconds: float) -> dict[str, Any]:
    why = [f"the worker ended with {os.waitstatus_to_exitcode(status)} after {seconds:.0f} s"]
    return {
        "model_type": row.model_type,
        "architecture": row.architecture,
        "counted": row.counted,
        "scheme": scheme,
        "layout": PUBLISHED,
        "verdict": CRASHED,
        "why": why,
        "coverage": None,
        "seconds": seconds,
    }


def _say(verdicts: list[dict[str, Any]], done: int, total: int) -> None:
    first = verdicts[0]
    line = " ".join(f"{each['scheme']}/{each['layout']}={each['verdict']}" for each in verdicts)
    seconds = sum(each["seconds"] for each in verdicts)
    print(f"[{done}/{total}] {first['model_type']} {first['architecture']} {line} {seconds:.0f}s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="", help="model types, with commas between; all by default")
    parser.add_argument("--json", type=Path, help="where the verdicts go")
    parser.add_argument("--markdown", type=Path, help="where an account of the faults goes")
    parser.add_argument("--page", action="store_true", help="write the table of docs/architectures.md")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="for one row")
    options = parser.parse_args()
    started = time.monotonic()

    def report(so_far: list[dict[str, Any]]) -> None:
        if options.json:
            options.json.write_text(json.dumps(so_far, indent=1))
        if options.markdown:
            options.markdown.write_text(faults(so_far))

    chosen = rows(filter(None, options.types.split(",")))
    verdicts = sweep(chosen, processes=options.processes, seconds=options.seconds, report=report)
    for each in verdicts:
        if each["why"] and (options.types or each["verdict"] in (WRONG, CRASHED)):
            where = (each[name] for name in ("model_type", "architecture", "scheme", "layout", "verdict"))
            print(*where, *(f"\n    {why}" for why in each["why"]))
    print(*counts_table(verdicts), f"{time.monotonic() - started:.0f} s", sep="\n")
    fewer = [] if options.types else fewer_than_committed(verdicts)
    print(*fewer, sep="\n")
    if options.page:
        write_page(verdicts)
    return int(bool(fewer) or any(each["verdict"] in (WRONG, CRASHED) for each in verdicts))


if __name__ == "__main__":
    sys.exit(main())
