"""Makes small checkpoints of real Transformer Engine models, and beside each what has to come out of it.

    PYTHONPATH=. python3 tests/gpu/te/make_checkpoints.py OUT [CASE …] [--jobs 8]

`OUT/CASE.tar.xz` holds

    CASE/config.json      of the model, for hf=
    CASE/checkpoint/      torch_dist, as Megatron's training saves it
    CASE/expected.json    see `make_one.Expected`
"""

import argparse
import lzma
import sys
import tarfile
from pathlib import Path

import torch
from cases import CASES
from launching import run_cases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    arguments = parser.parse_args()
    names, out = arguments.cases or list(CASES), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    made = 0
    for name in run_cases("make_one.py", out, names, jobs=arguments.jobs, gpus=torch.cuda.device_count()):
        pack(out / name, out / f"{name}.tar.xz")
        made += 1
    print(f"{made} of {len(names)} checkpoints made")
    sys.exit(made < len(names))


def pack(directory: Path, archive: Path) -> None:
    """Packs a directory without owners and times, so that the same files give the same bytes."""

    def bare(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        return entry.replace(mtime=0, uid=0, gid=0, uname="", gname="", deep=False)

    with lzma.open(archive, "wb", preset=9 | lzma.PRESET_EXTREME) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("config.json", "expected.json", "checkpoint"):
            tar.add(directory / name, f"{directory.name}/{name}", filter=bare)


if __name__ == "__main__":
    main()
