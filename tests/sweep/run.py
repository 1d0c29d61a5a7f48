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
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.sweep.architectures import PUBLISHED, Row, rows
from tests.sweep.judge_row import CRASHED, LIMIT, NOT_BUILT, REFUSED, RIGHT, SCHEMES, WRONG, judge, main_json

ORDER = (RIGHT, LIMIT, REFUSED, WRONG, CRASHED, NOT_BUILT)


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


def worst(verdicts: Sequence[dict[str, Any]]) -> str:
    """The verdict on a type: wrong if any layout is, else the worst of the published ones."""
    rank = (NOT_BUILT, RIGHT, LIMIT, REFUSED, CRASHED, WRONG)
    considered = [
        each["verdict"] for each in verdicts if each["layout"] == PUBLISHED or each["verdict"] in (WRONG, CRASHED)
    ]
    return max(considered or [NOT_BUILT], key=rank.index)


def summary(verdicts: Sequence[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Scheme → verdict → number of model types (the counted ones), each type by its worst."""
    counts: dict[str, Counter[str]] = {}
    for scheme in SCHEMES:
        for label, counted in (("counted", True), ("further", False)):
            types: dict[str, list[dict[str, Any]]] = {}
            for each in verdicts:
                if each["scheme"] == scheme and each["counted"] is counted:
                    types.setdefault(
                        each["model_type"] if counted else f"{each['model_type']} {each['architecture']}", []
                    ).append(each)
            counts[f"{scheme}, {label}"] = Counter(worst(several) for several in types.values())
    return counts


def kinds(verdicts: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Kind of fault of what is wrong → the model types that have it, the commonest kind first."""
    found: dict[str, dict[str, None]] = {}
    for each in verdicts:
        for why in each["why"] if each["verdict"] == WRONG else ():
            if not why.startswith(("transformers: ", "no logits: ")):
                found.setdefault(why.partition(" (")[0], {})[each["model_type"]] = None
    return {kind: sorted(types) for kind, types in sorted(found.items(), key=lambda item: -len(item[1]))}


def markdown(verdicts: Sequence[dict[str, Any]]) -> str:
    """A readable account, the faults first."""
    lines = ["# Sweep", "", "| | " + " | ".join(ORDER) + " |", "|---" * (1 + len(ORDER)) + "|"]
    for label, counts in summary(verdicts).items():
        lines.append(f"| {label} ({sum(counts.values())}) | " + " | ".join(str(counts[each]) for each in ORDER) + " |")
    lines += ["", "## Kinds", ""]
    for kind, types in kinds(verdicts).items():
        lines.append(f"- **{kind}**, {len(types)} types: {', '.join(types)}")
    for kind in (WRONG, CRASHED, REFUSED, LIMIT, NOT_BUILT, RIGHT):
        lines += ["", f"## {kind}", ""]
        for each in verdicts:
            if each["verdict"] == kind and not (kind == RIGHT and not each["why"] and (each["coverage"] or 0) > 0.5):
                where = f"**{each['model_type']}** {each['architecture']} {each['scheme']} {each['layout']}"
                share = "" if each["coverage"] is None else f" (quantized {each['coverage']:.0%})"
                lines.append(f"- {where}{share}: " + " · ".join(why.replace("\n", " ")[:300] for why in each["why"]))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="", help="model types, with commas between; all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=150)
    options = parser.parse_args()
    started = time.monotonic()

    def report(so_far: list[dict[str, Any]]) -> None:
        if options.json:
            options.json.write_text(json.dumps(so_far, indent=1))
        if options.markdown:
            options.markdown.write_text(markdown(so_far))

    chosen = rows(filter(None, options.types.split(",")))
    verdicts = sweep(chosen, processes=options.processes, seconds=options.seconds, report=report)
    for each in verdicts:
        if options.types and each["why"]:
            print(
                each["model_type"],
                each["scheme"],
                each["layout"],
                each["verdict"],
                each["coverage"],
                *each["why"],
                sep="\n    ",
            )
    for label, counts in summary(verdicts).items():
        print(f"{label}: " + ", ".join(f"{kind} {counts[kind]}" for kind in ORDER))
    print(f"{time.monotonic() - started:.0f} s")
    bad = sum(each["verdict"] in (WRONG, CRASHED) for each in verdicts)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
