"""Ranks and frameworks: live Megatron models on one side, Hugging Face checkpoints on the other."""

from bridge.auto import AutoBridge
from bridge.save import ExportReport

__all__ = ["AutoBridge", "ExportReport"]
