"""The runtime's Triton kernels in Triton's interpreter, in a process of its own: `gpu/test_runtime_on_gpu.py`."""

import subprocess
import sys

from tests.support.paths import ENVIRONMENT, ROOT


def test_kernels_in_the_interpreter() -> None:
    chosen = "kernel and (tokens5 or act_order or no_tokens) and not bfloat16"  # it multiplies the bits of bf16
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        chosen,
        "tests/gpu/test_runtime_on_gpu.py",
    ]
    environment = {**ENVIRONMENT, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "skipped" not in ran.stdout
