"""Model-free PTQ from directory to directory, beside llm-compressor's and beside the disk: `make bench`.

A 2 GB dense checkpoint and one with packed experts, in the page cache. Every run is a process of its own, ours and the
disk's several times in turn, the best counts; the peer's once, since it takes a minute or two.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
from rich.console import Console
from rich.table import Table

SCRIPT = Path(__file__).with_name("measured.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="the python of an environment with llmcompressor")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--schemes", nargs="+", default=["nvfp4a16"])
    parser.add_argument("--kinds", nargs="+", default=["dense", "moe"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", help="where to work; a temporary directory unless given")
    options = parser.parse_args()
    table = Table("checkpoint", "scheme", "", "wall s", "CPU s", "memory MB", "wall ×", "CPU ×", title="model-free PTQ")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for kind in options.kinds:
            source = checkpoints.write(Path(directory, kind), kind, options.gigabytes)
            for scheme in options.schemes:
                rows = compare(source, Path(directory, "out"), scheme, options)
                ours = rows["ours"]
                for name, row in rows.items():
                    figures = [f"{row[key]:.2f}" for key in ("wall", "cpu")] + [f"{row['memory']:.0f}"]
                    ratios = [f"{row[key] / ours[key]:.1f}" for key in ("wall", "cpu")]
                    table.add_row(kind, scheme, name, *figures, *ratios)
            shutil.rmtree(source)
    Console().print(table)


def compare(source: Path, target: Path, scheme: str, options: Any) -> dict[str, dict[str, float]]:
    """Measures each program, and returns what it took."""

    def run(program: str, python: str = sys.executable) -> dict[str, float]:
        if program != "disk":
            shutil.rmtree(target, ignore_errors=True)
        words = [python, SCRIPT, program, source, target, scheme, str(options.workers)]
        printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        result: dict[str, float] = json.loads(printed.splitlines()[-1])
        return result

    found: dict[str, list[dict[str, float]]] = {"ours": [], "disk": []}
    for _ in range(5):
        for program, results in found.items():
            results.append(run(program))
    best = {name: {key: min(each[key] for each in runs) for key in runs[0]} for name, runs in found.items()}
    return best | ({"llm-compressor": run("peer", options.peer)} if options.peer else {})


if __name__ == "__main__":
    main()
