"""What the model reads: Python's own help, in the model's tokens. The demo's three topics are held back here, too."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from amaxbridge.scripts.demo_text import topics

CONTEXT = 512
WINDOWS = 4  # that are held back
CALIBRATION_WINDOWS = 8


def held_back_windows(hf: Path) -> Tensor:
    """The first windows of the held-back topics, `[WINDOWS, CONTEXT + 1]`: inputs and, shifted by one, targets."""
    return _tokens(hf, held_back=True).unfold(0, CONTEXT + 1, CONTEXT)[:WINDOWS]


def calibration_windows(hf: Path) -> Tensor:
    """The first windows of all other topics, of the same shape."""
    return training_tokens(hf).unfold(0, CONTEXT + 1, CONTEXT + 1)[:CALIBRATION_WINDOWS]


def training_tokens(hf: Path) -> Tensor:
    """All other topics, int64 `[tokens]`."""
    return _tokens(hf, held_back=False)


def _tokens(hf: Path, *, held_back: bool) -> Tensor:
    ids = AutoTokenizer.from_pretrained(hf)(topics(held_back=held_back))["input_ids"]
    return torch.tensor([token for topic in ids for token in topic])
