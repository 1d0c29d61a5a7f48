"""What a command loads before it works: not what other commands need."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import dense_model, write_checkpoint

HEAVY = ("torch.distributed.checkpoint", "sympy", "torch._dynamo", "transformers", "megatron", "modelopt")
LOADED = """
import runpy, sys
sys.argv[0] = "amaxbridge"
try:
    runpy.run_module("amaxbridge", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded", *sorted(sys.modules))
"""


@pytest.mark.slow
def test_commands_without_a_model_load_no_framework_but_torch(tmp_path: Path) -> None:
    """`verify` without a reference asks transformers for the names and shapes of the model."""
    config = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "source", dense_model(1), config=config)
    commands = (
        ("quantize", "input=source", "output=out", "scheme=nvfp4a16"),
        ("verify", "input=out", "reference=source"),
        ("report", "input=out", "reference=source"),
    )
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-c", LOADED, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "torch" in loaded
        assert [name for name in HEAVY if name in loaded] == [], words
