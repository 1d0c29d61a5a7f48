"""The scales of an FP8 key-value cache: `k_scale` and `v_scale` of each attention layer, from its quantizers.

    self_attn.k_scale, self_attn.v_scale                 float32   [1]   amax / 448, a multiplier
    self_attn.k_proj.k_scale, self_attn.v_proj.v_scale   float32   []    the same, in ModelOpt's format

ModelOpt's exporter of Megatron models raises these scales to at least 1 as a precaution; ours are those that training
computed with.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import amax_of_scale
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.kernels.nvfp4 import FP8_MAX
from amaxbridge.export.schemes.signature import Arguments
from amaxbridge.mappings.errors import AmaxError, UsageError, listing
from amaxbridge.mappings.tensors import TensorSpec

_FORMAT = "fp8"  # of a cache quantizer, in the words of a `QuantState`
_QUANTIZERS = ("k", "v")
CACHE_QUANTIZERS = (".k_bmm_quantizer", ".v_bmm_quantizer")
"""Ends of the names of the cache's quantizers."""


def cache_amax(state: QuantState) -> Iterator[tuple[str, str]]:
    """The amax of all quantizers of the key-value cache, calibrated or not: `….k_bmm_quantizer._amax` and `k`."""
    formats = (f"{quantizer}._amax" for quantizer in state.formats)  # a dynamic one has no amax
    for name in dict.fromkeys((*state.amax, *state.missing, *formats)):
        for letter in _QUANTIZERS:
            if name.endswith(f".{letter}_bmm_quantizer._amax"):
                yield name, letter


def cache_scales(
    state: QuantState, specs: Mapping[str, TensorSpec], *, in_projections: bool = False
) -> dict[str, tuple[str, Tensor]]:
    """The scales to write: name of the k or v weight that it is written with → name and tensor.

    Args:
        in_projections: True for the names and dims of ModelOpt's format.

    Raises:
        AmaxError: an amax is missing, zero, negative or not finite; all of them are named.
        UsageError: a quantizer of the cache is not FP8, or its layer has no k or v weight.
    """
    scales, unusable, others = dict[str, tuple[str, Tensor]](), list[str](), list[str]()
    for name, letter in cache_amax(state):
        quantizer = name.removesuffix("._amax")
        attention = quantizer.rpartition(".")[0]
        weight = f"{attention}.{letter}_proj.weight"
        amax = state.amax.get(name)
        if state.formats.get(quantizer, _FORMAT) != _FORMAT or weight not in specs:
            others.append(f"{quantizer}: {state.formats.get(quantizer, _FORMAT)}")
        elif amax is None or not 0 < amax.item() < math.inf:
            unusable.append(f"{name}: {'missing' if amax is None else amax.item()}")
        else:
            scale = amax.float() / torch.full_like(amax, FP8_MAX, dtype=torch.float32)
            module = weight.removesuffix(".weight") if in_projections else attention
            scales[weight] = f"{module}.{letter}_scale", scale.reshape(() if in_projections else 1)
    if others:
        raise UsageError(
            f"{len(others)} quantizers of the key-value cache are not FP8 with one static scale, or their layer has no "
            f"weights of keys and values:{listing(others)}\n"
            "kv_cache_scheme has no place for them; calibrate with FP8_KV_CFG, or disable them before the export"
        )
    if unusable:
        raise AmaxError(
            f"{len(unusable)} amax of the key-value cache make no scale:{listing(unusable)}\n"
            "Calibrate the model, or disable these quantizers"
        )
    return scales


def stored_cache_scales(tensors: Iterable[str], cache: Arguments | None) -> dict[str, str]:
    """The scales of the key-value cache in a checkpoint: name of the quantizer's buffer → name of the scale.

    Args:
        tensors: the names of all tensors.
        cache: `kv_cache_scheme` of config.json, if any. It must be FP8 with one scale for each layer.
    """
    if cache is not None and (cache.bits, cache.kind, cache.strategy) != (8, "float", "tensor"):
        return {}
    return {
        f"{name.removesuffix(suffix).removesuffix(f'.{letter}_proj')}.{letter}_bmm_quantizer._amax": name
        for name in tensors
        for letter in _QUANTIZERS
        if name.endswith(suffix := f".{letter}_scale")
    }


def amax_of_cache_scale(scale: Tensor) -> Tensor:
    """The amax that `cache_scales` makes this scale from: fp32, 0-d."""
    return amax_of_scale(scale.reshape(()), FP8_MAX)
