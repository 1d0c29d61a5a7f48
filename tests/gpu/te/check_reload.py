"""Loads the checkpoints that `make_checkpoints.py` made into new models: logits must be those that were saved.

PYTHONPATH=. python3 tests/gpu/te/check_reload.py OUT [CASE …] [--jobs 8]
"""

import argparse
import sys
from pathlib import Path

import torch
from cases import CASES
from launching import run_cases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="where make_checkpoints.py wrote")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; those in OUT by default")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    arguments = parser.parse_args()
    names = arguments.cases or [name for name in CASES if (arguments.out / name / "expected.json").is_file()]
    gpus = torch.cuda.device_count()
    equal = len(list(run_cases("reload_one.py", arguments.out, names, jobs=arguments.jobs, gpus=gpus)))
    print(f"{equal} of {len(names)} reloaded models compute what was saved")
    sys.exit(equal < len(names))


if __name__ == "__main__":
    main()
