"""Which schemes transformers serves, found by trying.

A tiny Qwen3 and a tiny Qwen3-MoE are quantized in every scheme and loaded by transformers. The logits are compared with
those of the same model with dequantized weights in 16 bits. Where they differ by more than quantized inputs explain,
transformers computes something else.
"""

import contextlib
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from amaxbridge.export.dequantized import DequantizedCheckpoint
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.mappings.names import module_of
from tests.support.checkpoints_to_verify import make

BOUND = 0.7
"""Relative error of logits above which they are nonsense: inputs in 4 bits explain 0.45, nonsense is above 1."""


def tiny(directory: Path, *, experts: bool, tied: bool = False) -> Path:
    """A random model in Hugging Face's format."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 131, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "initializer_range": 0.08,
    }  # fmt: skip
    if experts:
        config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
        model: Any = Qwen3MoeForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.bfloat16().save_pretrained(directory)
    return directory


def served() -> dict[str, dict[str, str]]:
    """Scheme → for linear layers and for experts: `loads`, or `!` and what went wrong."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as work:
        for part, experts in (("linear", False), ("experts", True)):
            source = tiny(Path(work) / part, experts=experts)
            for scheme in SCHEMES:
                target = Path(work) / f"{part}-{scheme}"
                made = make(source, scheme)
                made.write(target, 200_000)
                found.setdefault(scheme, {})[part] = _outcome(source, target)
    return found


def _outcome(source: Path, target: Path) -> str:
    plain = source.parent / f"{target.name}-plain"
    plain.mkdir()
    config = json.loads((target / "config.json").read_text())
    with contextlib.closing(SafetensorsCheckpoint(target)) as checkpoint:
        dequantized = DequantizedCheckpoint(checkpoint, config.pop("quantization_config"))
        kept = [name for name in checkpoint.weight_map if module_of(name) not in dequantized.schemes]
        names = [*kept, *(f"{module}.weight" for module in dequantized.schemes)]
        save_file({name: dequantized.read(name) for name in names}, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text(json.dumps(config))
    right = _logits(plain)
    try:
        found = _logits(target)
    except Exception as error:
        return f"!{type(error).__name__}: {' '.join(str(error).split())[:110]}"
    if not found.isfinite().all():
        return "!computes NaN"
    difference = float((found - right).norm() / right.norm())
    return "loads" if difference < BOUND else f"!loads, and logits are off by {difference:.0%}"


def _logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        tokens = torch.arange(1, 33)[None]
        with torch.no_grad():
            logits: torch.Tensor = model(tokens).logits.float()
    return logits
