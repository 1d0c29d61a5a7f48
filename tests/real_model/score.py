"""A checkpoint in transformers: the cross entropy of each held-back token."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from amaxbridge.export.runtime import load_model_
from amaxbridge.mappings.errors import CheckpointError

BATCH = 2


@dataclass(frozen=True, slots=True)
class Scores:
    """Cross entropy of each token, fp32 `[windows, tokens]`, and the sum of the safetensors files in bytes."""

    losses: Tensor
    size: int = 0

    @property
    def perplexity(self) -> float:
        return float(self.losses.double().mean().exp())

    def change_from(self, other: "Scores") -> float:
        """The mean absolute change of a token's log-probability."""
        return float((self.losses - other.losses).abs().mean())


@torch.no_grad()
def score(
    directory: Path,
    windows: Tensor,
    *,
    in_runtime: bool = False,
    quantize_inputs: bool = True,
    move_weights: bool = False,
) -> Scores:
    """Scores a checkpoint with fp32 activations and the weights that its bytes stand for.

    Args:
        windows: token ids, `[windows, length]`.
        in_runtime: load it with `amaxbridge.export.runtime`, for a format that transformers does not load.
        quantize_inputs: False to leave inputs unquantized.
        move_weights: True to move every quantized weight at random by up to 2^-9 of itself, half a unit in the last
            place of bf16.

    Raises:
        CheckpointError: transformers misses keys, or does not know some.
    """
    model = _in_runtime(directory) if in_runtime else _in_transformers(directory, windows)
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):  # compressed-tensors' mark of a quantized module
            if not quantize_inputs:
                setattr(module, "quantization_enabled", False)  # noqa: B010
            if move_weights:
                weight = module.get_parameter("weight")
                weight.mul_(1 + (torch.rand_like(weight) * 2 - 1) * 2**-9)
    losses = torch.cat([_losses(model, batch) for batch in windows.split(BATCH)])
    return Scores(losses, sum(file.stat().st_size for file in directory.glob("*.safetensors")))


def _in_transformers(directory: Path, windows: Tensor) -> nn.Module:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors shows progress bars there
        model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        model.eval()(windows[:1, :1])  # the first forward dequantizes the weights
    if problems := [f"{kind}: {', '.join(map(str, keys))}" for kind, keys in loading.items() if keys]:
        raise CheckpointError(f"{directory}: {'; '.join(problems)}")
    return _float(model)


def _float(model: nn.Module) -> nn.Module:
    """Converts a model to fp32; transformers' own `float` refuses a quantized one."""
    return nn.Module.float(model)


def _in_runtime(directory: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(directory)
    assert json.loads((directory / "config.json").read_text())["quantization_config"]
    del config.quantization_config
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    load_model_(model, directory)
    return model


def _losses(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1]).logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1)
