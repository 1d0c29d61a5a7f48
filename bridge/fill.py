"""Filling a live Megatron model from Hugging Face tensors: each rank reads what its own shards need."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bridge.parameters import Parameter
from bridge.plan import find_mappings
from mappings.errors import MappingError, listing
from mappings.ranks import Ranks
from mappings.registry import MappingRegistry


def fill_parameters(
    parameters: Iterable[Parameter],
    read: Callable[[str], Tensor],
    registry: MappingRegistry,
    config: Any,
    ranks: Ranks,
) -> None:
    """Copies into each parameter its shard of the Hugging Face tensors. No communication.

    Args:
        read: Hugging Face name → tensor.

    Raises:
        UnmappedParameterError: parameters without a mapping.
        MappingError: shards that do not have the parameter's shape; all of them are named.
    """
    parameters = list(parameters)
    mappings = find_mappings([parameter.name for parameter in parameters], registry)
    problems = []
    for parameter in parameters:
        mapping = mappings[parameter.name]
        tensors = {name: read(name) for name in mapping.targets}
        shard = mapping.split(tensors, config, ranks.rank(mapping.axis), ranks.size(mapping.axis))
        if shard.shape != parameter.tensor.shape:
            problems.append(f"{parameter.name}: has {list(parameter.tensor.shape)}, its shard is {list(shard.shape)}")
            continue
        with torch.no_grad():
            parameter.tensor.copy_(shard)
    if problems:
        raise MappingError(f"{len(problems)} parameters do not fit the Hugging Face tensors:{listing(problems)}")
