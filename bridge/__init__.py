"""Ranks and frameworks: live Megatron models on one side, Hugging Face checkpoints on the other."""

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.save import ExportReport

__all__ = ["AutoBridge", "ExportReport"]
