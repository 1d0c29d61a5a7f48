"""Shared fixtures: a tiny Hugging Face model, and real Megatron processes exporting it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
WORKERS = ROOT / "tests" / "workers"


def launch(*command: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a script in processes of its own, under torchrun where there are several."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    words = [sys.executable, *torchrun, *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 in Hugging Face's format: grouped-query attention, a vocabulary that TP=2 must pad."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.bfloat16().save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return directory


@pytest.fixture(scope="session")
def live(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> "LiveExports":
    """What real Megatron ranks exported, at TP=1, TP=2 and PP=2."""
    return LiveExports(qwen3, tmp_path_factory.mktemp("live"))


class LiveExports:
    """Runs `workers/live_export.py` once per topology, when first asked for."""

    def __init__(self, hf: Path, root: Path) -> None:
        self.hf = hf
        self._root = root

    def at(self, tp: int = 1, pp: int = 1) -> Path:
        """The directory of everything that the ranks of this topology wrote."""
        directory = self._root / f"tp{tp}pp{pp}"
        if not directory.exists():
            launch(WORKERS / "live_export.py", self.hf, directory, tp, pp, processes=tp * pp)
        return directory

    def report(self, tp: int = 1, pp: int = 1) -> dict[str, Any]:
        """What the worker noted down: messages of warnings and errors."""
        report: dict[str, Any] = json.loads((self.at(tp, pp) / "report.json").read_text())
        return report
