"""Loads every checkpoint of a directory in vLLM on a GPU, and prints the tables of docs/in-vllm.md.

    python serve_all.py MADE_DIR OUT_DIR [--jobs 14] [--families]

MADE_DIR is what `prepare.py` or `prepare_families.py` made. Runs in vLLM's environment, several processes at a time on
one GPU. Exit status 1 if both formats of a checkpoint load and differ although the kernels are the same.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import batched, chain, groupby
from pathlib import Path
from typing import Any

import torch

SERVE = Path(__file__).with_name("serve_some.py")
A_PROCESS = 4  # checkpoints of a model: it takes longer to start than to load one
MODELOPT = ".modelopt"
type Found = Mapping[tuple[str, str], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("made", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--families", action="store_true", help="the table of families: a row for each model")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    references = sorted(file for file in options.made.glob("*/*.safetensors") if ".tp" not in file.name)
    work = [
        (checkpoint, file)
        for file in references
        for checkpoint in (file.with_suffix(""), file.with_suffix(MODELOPT))
        if checkpoint.is_dir()
    ]
    command = (sys.executable, SERVE, options.out)
    models = [list(found) for _, found in groupby(work, lambda pair: pair[0].parent)]
    some = [part for found in models for part in batched(found, A_PROCESS)]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda pairs: subprocess.run([*command, *chain(*pairs)], check=False), some))
    found = {(each["model"], each["name"]): each for each in map(torch.load, sorted(options.out.glob("*.pt")))}
    crashed = {(checkpoint.parent.name, checkpoint.name) for checkpoint, _ in work} - found.keys()
    found |= {each: {"error": "the process ended"} for each in crashed}
    print("\n".join(rows_of_families(found) if options.families else rows(found)))
    return any(difference(found, key) and not other_kernels(found, key) for key in found)


def rows(found: Found) -> Iterator[str]:
    yield "| model | scheme | mean | largest | ModelOpt's format | kernels |"
    yield "|---|---|---:|---:|---|---|"
    for (model, name), case in found.items():
        if not name.endswith(MODELOPT):
            figures = ("does not load", "–") if "error" in case else (f"{case['mean']:.3f}", f"{case['largest']:.2f}")
            kernels = ", ".join(kernels_of(case)) or "–"
            yield f"| {model} | {name} | {' | '.join(figures)} | {formats(found, (model, name))} | {kernels} |"


def rows_of_families(found: Found) -> Iterator[str]:
    """A row for each model: how far log-probabilities are, by scheme; then why something did not load."""
    schemes = ("none", *dict.fromkeys(name for _, name in found if name != "none"))
    yield f"| model | {' | '.join(schemes)} |"
    yield f"|---|{'---:|' * len(schemes)}"
    for model in dict.fromkeys(model for model, _ in found):
        cases = [found.get((model, scheme), {}) for scheme in schemes]
        cells = ["–" if not case else "no" if "error" in case else f"{case['mean']:.3f}" for case in cases]
        yield f"| {model.replace('_', ' ')} | {' | '.join(cells)} |"
    reasons: dict[str, list[str]] = {}
    for (model, scheme), case in found.items():
        if "error" in case:
            reasons.setdefault(case["error"][:120], []).append(f"{model.replace('_', ' ')} {scheme}")
    yield from ("", *(f"- {', '.join(who)}: `{why}`" for why, who in reasons.items()))


def formats(found: Found, key: tuple[str, str]) -> str:
    """What ModelOpt's format gives beside compressed-tensors."""
    other = found.get((key[0], key[1] + MODELOPT))
    if other is None:
        return "–"
    if "error" in other:
        return f"does not load: `{other['error']}`"
    off = difference(found, (key[0], key[1] + MODELOPT))
    return f"mean {off:.3f} apart: {', '.join(kernels_of(other))}" if off else "equal"


def difference(found: Found, key: tuple[str, str]) -> float:
    """Mean difference of log-probabilities between the two formats of a checkpoint, where both load."""
    one, other = found[key], found.get((key[0], key[1].removesuffix(MODELOPT)), {})
    if "error" in one or "error" in other:
        return 0.0
    return float((one["logprobs"] - other["logprobs"]).abs().mean())


def other_kernels(found: Found, key: tuple[str, str]) -> bool:
    return kernels_of(found[key]) != kernels_of(found[key[0], key[1].removesuffix(MODELOPT)])


def kernels_of(case: Mapping[str, Any]) -> list[str]:
    """Kernels of linear layers, and the backend of experts."""
    return [
        name for name in case.get("kernels", ()) if name.endswith("LinearKernel") or "ScaledMM" in name or "=" in name
    ]


if __name__ == "__main__":
    sys.exit(main())
