"""Collecting the quantizer state of a live model in Hugging Face names, reduced over all ranks that hold it.

Every quantizer's amax is fanned out to its Hugging Face names on its own rank, without communication. Then one
collective takes the maximum by name over all ranks: tensor and data parallel replicas that drifted apart, experts
and pipeline stages all fall into place, because a rank that has no value for a name contributes minus infinity.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bridge.parameters import Quantizer
from export.quant_state import Divergence, QuantState
from mappings.amax import WEIGHT_QUANTIZER
from mappings.errors import UnmappedParameterError, listing
from mappings.names import natural_key
from mappings.ranks import Axis, Ranks
from mappings.registry import MappingRegistry

_NO_VALUE = float("-inf")


def collect_quant_state(
    quantizers: Iterable[Quantizer], registry: MappingRegistry, config: Any, ranks: Ranks
) -> QuantState:
    """The state of all enabled quantizers of all ranks. Collective; every rank gets the same.

    Raises:
        UnmappedParameterError: an enabled quantizer has no Hugging Face name.
        AmaxError: an amax that is not per-tensor.
    """
    local, formats, problems = _local_state(quantizers, registry, config)
    reports = ranks.all_gather_object(Axis.WORLD, (list(local), formats, problems))
    unmapped = sorted({problem for _, _, found in reports for problem in found}, key=natural_key)
    if unmapped:
        raise UnmappedParameterError(f"{len(unmapped)} enabled quantizers cannot be exported:{listing(unmapped)}")
    names = sorted({name for held, _, _ in reports for name in held}, key=natural_key)
    least, greatest = _reduce(names, local, ranks)
    known = [name for name in names if greatest[name] != _NO_VALUE]
    return QuantState(
        amax={name: torch.tensor(greatest[name]) for name in known},
        formats={module: found for _, each, _ in reports for module, found in each.items()},
        missing=frozenset(names) - frozenset(known),
        divergent={name: Divergence(least[name], greatest[name]) for name in known if least[name] != greatest[name]},
    )


def _local_state(
    quantizers: Iterable[Quantizer], registry: MappingRegistry, config: Any
) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """This rank's amax by Hugging Face name (minus infinity where there is none), formats by module, problems."""
    values: dict[str, float] = {}
    formats: dict[str, str] = {}
    problems: list[str] = []
    for quantizer in quantizers:
        mapping = registry.megatron_to_hf_lookup(quantizer.name + "._amax")
        if mapping is None:
            problems.append(f"{quantizer.name}: no mapping")
            continue
        amax = getattr(quantizer.module, "_amax", None)
        if amax is not None and amax.numel() != 1:
            problems.append(f"{quantizer.name}: amax of shape {list(amax.shape)}; only per-tensor amax is supported")
            continue
        for name in mapping.targets:
            values[name] = _NO_VALUE if amax is None else _finite_or_inf(amax)
            if name.endswith(WEIGHT_QUANTIZER):
                formats[name.removesuffix(WEIGHT_QUANTIZER)] = format_name(quantizer.module)
    return values, formats, problems


def _finite_or_inf(amax: Tensor) -> float:
    """The value; NaN as infinity, which survives a maximum on every backend and is refused all the same."""
    value = float(amax)
    return value if value == value else float("inf")


def _reduce(names: list[str], local: Mapping[str, float], ranks: Ranks) -> tuple[dict[str, float], dict[str, float]]:
    """Least and greatest value of each name over all ranks that have one, in one collective."""
    values = torch.tensor([local.get(name, _NO_VALUE) for name in names], dtype=torch.float32)
    negated = torch.where(values == _NO_VALUE, values, -values)
    greatest, least = ranks.all_reduce_max(Axis.WORLD, torch.stack([values, negated]))
    return dict(zip(names, (-least).tolist(), strict=True)), dict(zip(names, greatest.tolist(), strict=True))


def format_name(quantizer: Any) -> str:
    """What a ModelOpt TensorQuantizer quantizes to, in the words the schemes use: `nvfp4`, or a description."""
    bits, blocks = quantizer.num_bits, quantizer.block_sizes or {}
    if bits == (2, 1) and blocks.get(-1) == 16 and blocks.get("scale_bits") == (4, 3):
        return "nvfp4"
    return f"num_bits={bits} block_sizes={blocks or None}"
