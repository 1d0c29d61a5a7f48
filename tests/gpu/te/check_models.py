"""What `make_checkpoints.py` made, brought back into new models.

    PYTHONPATH=. python3 tests/gpu/te/check_models.py {reload,export,served,import} OUT [CASE …] [--jobs 8]

`reload` loads the checkpoints: logits must be those that were saved. `export` exports what it loads, FP8 parameters in
blocks also as they are: tensors must be those of the live export. `served` brings the live export back into models,
weights and amax, which must export the same. `import` does so with FP8 parameters, and takes a step of Megatron's
distributed optimizer that moves nothing: the model must still be the same.
"""

import argparse
import sys
from pathlib import Path

import torch
from cases import CASES
from launching import run_cases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("check", choices=["reload", "export", "served", "import"])
    parser.add_argument("out", type=Path, help="where make_checkpoints.py wrote")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; those in OUT by default")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    arguments = parser.parse_args()
    made = [name for name in CASES if (arguments.out / name / "expected.json").is_file()]
    fitting = [name for name in made if arguments.check != "import" or CASES[name].fp8_parameters]
    names, script = arguments.cases or fitting, f"{arguments.check}_one.py"
    good = list(run_cases(script, arguments.out, names, jobs=arguments.jobs, gpus=torch.cuda.device_count()))
    print(f"{arguments.check}: {len(good)} of {len(names)} models are what was saved")
    sys.exit(not names or len(good) < len(names))


if __name__ == "__main__":
    main()
