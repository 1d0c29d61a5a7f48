"""NaN and Inf are named in tensors that stay unquantized, and refused in weights to be quantized."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import MappingError, UsageError

NORM, EMBEDDING, WEIGHT = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"


def source(directory: Path, name: str, value: float, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny checkpoint with one number replaced."""
    torch.manual_seed(0)
    tensors = {
        NORM: torch.ones(64), EMBEDDING: torch.randn(16, 64), WEIGHT: torch.randn(64, 64),
        "lm_head.weight": torch.randn(16, 64),
    }  # fmt: skip
    tensors = {each: tensor.to(dtype) for each, tensor in tensors.items()}
    tensors[name].view(-1)[7] = value
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("name", [NORM, EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_unquantized_tensors(
    name: str, value: float, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = source(tmp_path / "hf", name, value, dtype)
    with caplog.at_level(logging.WARNING, logger="amaxbridge"):
        model_free_ptq(hf, tmp_path / "out", "fp8_dynamic")
    named = [record.getMessage() for record in caplog.records if "NaN or Inf" in record.getMessage()]
    assert [message.split()[0] for message in named] == [name]
    with pytest.raises(MappingError, match=f"{name} holds NaN or Inf"):
        model_free_ptq(hf, tmp_path / "strict", "fp8_dynamic", nonfinite="error")
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("policy", ["warn", "error"])
def test_quantized_weights_are_refused_either_way(policy: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match=WEIGHT.removesuffix(".weight")):
        model_free_ptq(source(tmp_path / "hf", WEIGHT, math.nan), tmp_path / "out", "fp8_dynamic", nonfinite=policy)


def test_finite_tensors_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_free_ptq(source(tmp_path / "hf", NORM, 3.0e38, torch.float32), tmp_path / "out", "w8a8", nonfinite="error")
    assert "NaN or Inf" not in caplog.text


def test_an_unknown_policy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Unknown nonfinite=skip\. Use one of warn, error"):
        model_free_ptq(source(tmp_path / "hf", NORM, 1.0), tmp_path / "out", "w8a8", nonfinite="skip")
