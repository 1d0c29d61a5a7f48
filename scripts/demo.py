"""`make demo`: the whole way with a tiny model, on two cores, in a few minutes.

Trains a Qwen3 in Megatron-Core on tensor-parallel ranks, quantizes it with ModelOpt (calibration, then QAT), saves
Megatron's distributed checkpoint, exports it in a separate process, loads the result in transformers and compares.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from amaxbridge import cli
from amaxbridge.configs.schema import DemoConfig

SCRIPTS = Path(__file__).resolve().parent


def demo(options: DemoConfig) -> None:
    """Runs steps that a user could type; the checks at the end read only what the steps wrote."""
    from amaxbridge.mappings.extras import EXTRAS, need

    need("The demo", *EXTRAS["megatron"])
    from amaxbridge.scripts.demo_check import check, compare
    from amaxbridge.scripts.demo_text import write_hf_model
    from amaxbridge.scripts.tables import demo_table

    output = Path(options.output).absolute()
    shutil.rmtree(output, ignore_errors=True)
    hf, checkpoint, results = output / "hf", output / "megatron", output / "results.json"
    write_hf_model(hf)
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.processes}"]
    run([*torchrun, SCRIPTS / "demo_training.py", hf, checkpoint, results])
    for scheme in ("nvfp4", "none"):
        arguments = [f"checkpoint={checkpoint}", f"hf={hf}", f"output={output / scheme}", f"scheme={scheme}"]
        run([*torchrun, SCRIPTS / "export.py", *arguments])
    findings = compare(output)
    demo_table(json.loads(results.read_text()), findings)
    check(findings)


def run(command: list[object]) -> None:
    """Runs one step and shows the command and its output; a failing step ends the demo."""
    words = [str(word) for word in command]
    print("\n$", " ".join(["torchrun", *words[3:]]).replace(str(Path.cwd()) + "/", ""), flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun would also set this, with a warning
    status = subprocess.run(words, env=environment).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """`make demo`."""
    cli.run("demo", demo)


if __name__ == "__main__":
    main()
