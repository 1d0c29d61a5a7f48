"""What a Megatron parameter or quantizer buffer is in Hugging Face names, in both directions. Pure.

Imports torch and the standard library only; see README.md for the reading order.
"""

from mappings.amax import (
    INPUT_QUANTIZER,
    WEIGHT_QUANTIZER,
    AmaxFanoutMapping,
    AmaxMapping,
    MoeAmaxFanoutMapping,
    convert_to_amax_map,
)
from mappings.mapping import MegatronParamMapping
from mappings.names import NamePattern
from mappings.registry import MappingRegistry
from mappings.weights import (
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
    "MegatronParamMapping",
    "MoeAmaxFanoutMapping",
    "NamePattern",
    "QKVMapping",
    "ReplicatedMapping",
    "RowParallelMapping",
    "VocabParallelMapping",
    "convert_to_amax_map",
]
