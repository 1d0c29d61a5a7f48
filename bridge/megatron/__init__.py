"""Megatron-Core and ModelOpt: process groups, building a model, its checkpoints. The only user of both.

Megatron's model classes and module paths move between releases (GPTModel is announced as deprecated in favour of
HybridModel); all code that must follow is here.
"""

from amaxbridge.mappings.extras import EXTRAS, need

need("A model in Megatron", *EXTRAS["megatron"])

from amaxbridge.bridge.megatron.build_model import build_chunks, build_model
from amaxbridge.bridge.megatron.insert_quantizers import cache_quantizers, enable_quantizer, insert_quantizers
from amaxbridge.bridge.megatron.megatron_checkpoint import load_checkpoint, save_checkpoint
from amaxbridge.bridge.megatron.process_groups import distributed, parallel_state_of, process_ranks

__all__ = [
    "build_chunks",
    "build_model",
    "cache_quantizers",
    "distributed",
    "enable_quantizer",
    "insert_quantizers",
    "load_checkpoint",
    "parallel_state_of",
    "process_ranks",
    "save_checkpoint",
]
