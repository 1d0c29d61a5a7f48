"""Maps Megatron parameters and quantizer buffers to Hugging Face names, and back. Pure.

Imports torch and the standard library only; see README.md for the reading order.
"""

from amaxbridge.mappings.amax import (
    INPUT_QUANTIZER,
    WEIGHT_QUANTIZER,
    AmaxFanoutMapping,
    AmaxMapping,
    MoeAmaxFanoutMapping,
    convert_to_amax_map,
)
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import NamePattern
from amaxbridge.mappings.registry import MappingRegistry, MegatronMappingRegistry
from amaxbridge.mappings.weights import (
    AutoMapping,
    ColumnParallelMapping,
    DirectMapping,
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
    VocabParallelMapping,
)

__all__ = [
    "INPUT_QUANTIZER",
    "WEIGHT_QUANTIZER",
    "AmaxFanoutMapping",
    "AmaxMapping",
    "AutoMapping",
    "ColumnParallelMapping",
    "DirectMapping",
    "GatedMLPMapping",
    "MappingRegistry",
    "MegatronMappingRegistry",
    "MegatronParamMapping",
    "MoeAmaxFanoutMapping",
    "NamePattern",
    "QKVMapping",
    "ReplicatedMapping",
    "RowParallelMapping",
    "VocabParallelMapping",
    "convert_to_amax_map",
]
