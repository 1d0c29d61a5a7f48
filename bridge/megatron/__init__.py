"""Megatron-Core and ModelOpt: process groups, building a model, its checkpoints. The only user of both.

Megatron's model classes and module paths move between releases (GPTModel is announced as deprecated in favour of
HybridModel); what has to follow is here.
"""

from bridge.megatron.build import build_chunks, build_model
from bridge.megatron.checkpoint import load_checkpoint, save_checkpoint
from bridge.megatron.groups import distributed, process_ranks
from bridge.megatron.quantizers import cache_quantizers, enable_cache, enable_inputs, enable_weights, insert_quantizers

__all__ = [
    "build_chunks",
    "build_model",
    "cache_quantizers",
    "distributed",
    "enable_cache",
    "enable_inputs",
    "enable_weights",
    "insert_quantizers",
    "load_checkpoint",
    "process_ranks",
    "save_checkpoint",
]
