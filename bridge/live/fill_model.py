"""Filling a live Megatron model from Hugging Face tensors and amax: each rank reads what its own shards need."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from amaxbridge.bridge.live.collect_amax import amax_shape, is_dynamic, is_per_head, quantizer_mapping
from amaxbridge.bridge.live.model_walk import Parameter, Quantizer
from amaxbridge.bridge.live.quantized_parameters import fill
from amaxbridge.bridge.plan.export_plan import find_mappings
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.mappings.errors import AmaxError, MappingError, UnmappedParameterError, listing
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.ranks import Ranks
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.mappings.tensors import TensorSpec


def fill_quantizers(
    quantizers: Iterable[Quantizer], state: QuantState, registry: MappingRegistry, config: ModelConfig, ranks: Ranks
) -> None:
    """Sets the amax of each enabled quantizer from Hugging Face names: the inverse of collecting. No communication.

    Several Hugging Face values for one Megatron quantizer become their maximum; a per-channel or per-block amax is
    sharded like its weight.

    Raises:
        UnmappedParameterError: an enabled quantizer has no Hugging Face name.
        AmaxError: the state has no value for an enabled static quantizer; all of them are named.
    """
    missing = []
    for quantizer in quantizers:
        mapping = quantizer_mapping(quantizer, registry)
        if mapping is None:
            raise UnmappedParameterError(f"{quantizer.name}: this enabled quantizer has no mapping; disable it first")
        values = {name: state.amax[name] for name in mapping.targets if name in state.amax}
        if len(values) == len(mapping.targets):
            amax = mapping.split(values, config, ranks.rank(mapping.axis), ranks.size(mapping.axis))
            _set_amax(quantizer, amax)
        elif not is_dynamic(quantizer.module):
            missing += [name for name in mapping.targets if name not in values]
    if missing:
        raise AmaxError(f"the quantizer state has no value for {len(missing)} quantizers:{listing(missing)}")


def _set_amax(quantizer: Quantizer, amax: Tensor) -> None:
    """Sets the amax in the quantizer's own shape, in a new fp32 buffer: an existing bf16 buffer would round it."""
    held = getattr(quantizer.module, "_amax", None)
    if held is not None and held.numel() == amax.numel():
        amax = amax.reshape(held.shape).to(held.device)
    elif is_per_head(quantizer):
        amax = amax.reshape(1, 1, -1, 1)  # as keys and values: [tokens, batch, heads, head_dim]
    elif amax.numel() > 1:
        amax = amax.reshape(amax_shape(quantizer.module.block_sizes or {}, amax.shape))
    if held is not None:
        del quantizer.module._amax
    quantizer.module.amax = amax.clone()


def mappings_of(parameters: Iterable[Parameter], registry: MappingRegistry) -> list[MegatronParamMapping]:
    """The mapping of each parameter.

    Raises:
        UnmappedParameterError: parameters have no mapping; all of them are named.
    """
    specs = {parameter.name: TensorSpec.of(parameter.tensor) for parameter in parameters}
    return list(find_mappings(list(specs), registry, specs).values())


def fill_parameters(
    parameters: Sequence[Parameter],
    mappings: Sequence[MegatronParamMapping],
    read: Callable[[str], Tensor],
    config: ModelConfig,
    ranks: Ranks,
) -> None:
    """Copies into each parameter its shard of the Hugging Face tensors. No communication.

    Args:
        mappings: that of each parameter.
        read: Hugging Face name → tensor.

    Raises:
        MappingError: shards do not have their parameter's shape; all of them are named.
    """
    problems = []
    for parameter, mapping in zip(parameters, mappings, strict=True):
        tensors = {name: read(name) for name in mapping.targets}
        shard = mapping.split(tensors, config, ranks.rank(mapping.axis), ranks.size(mapping.axis))
        if shard.shape != parameter.tensor.shape:
            problems.append(f"{parameter.name}: has {list(parameter.tensor.shape)}, its shard is {list(shard.shape)}")
            continue
        fill(parameter.tensor, shard)
    if problems:
        raise MappingError(f"{len(problems)} parameters do not fit the Hugging Face tensors:{listing(problems)}")
