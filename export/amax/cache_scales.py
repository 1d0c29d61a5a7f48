"""The scales of a quantized key-value cache: `k_scale` and `v_scale` of each attention layer, from its quantizers.

    self_attn.k_scale, self_attn.v_scale                 float32   [1]            amax / 448, a multiplier
                                                                   [heads, 1, 1]  one for each key and value head
    self_attn.k_proj.k_scale, self_attn.v_proj.v_scale   float32   []             the same, in ModelOpt's format
                                                                                  NVFP4: amax / (6 · 448)

NVFP4 has a global scale in the checkpoint; engines make the scale of each block at run time, as ModelOpt's quantizer
does. ModelOpt's exporter of Megatron models raises FP8 scales to at least 1 as a precaution; ours are those that
training computed with. vLLM takes one scale for each head as compressed-tensors stores it, and reads NVFP4 from
ModelOpt's format alone.

Sources: vLLM 0.33, `CompressedTensorsKVCacheMethod`, `get_kv_cache_quant_algo_string` and csrc/libtorch_stable/
nvfp4_kv_cache_kernels.cu (`global_scale = 1 / k_scale`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import amax_of_scale
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.kernels.nvfp4 import FP8_MAX, SCALE_RANGE
from amaxbridge.export.schemes import COMPRESSED_TENSORS, MODELOPT_FORMAT
from amaxbridge.export.schemes.quantizer_settings import BLOCKS_OF_E2M1, QuantizerSettings
from amaxbridge.export.schemes.scheme import arguments
from amaxbridge.export.schemes.signature import Arguments
from amaxbridge.mappings.errors import AmaxError, UsageError, listing
from amaxbridge.mappings.tensors import TensorSpec

_QUANTIZERS = ("k", "v")
CACHE_QUANTIZERS = (".k_bmm_quantizer", ".v_bmm_quantizer")
"""Ends of the names of the cache's quantizers."""


@dataclass(frozen=True)
class CacheFormat:
    """A format in which engines keep keys and values.

    Args:
        name: in a `QuantState`.
        words: what it is, in messages and on the model card.
        config: `kv_cache_scheme` in the words of compressed-tensors.
        algorithm: `kv_cache_quant_algo` of ModelOpt's files; "" if they cannot say it.
        quantizer: the settings of ModelOpt's quantizers that mean it.
        divisor: amax / divisor is the scale.
        files: the formats of files that can say it.
    """

    name: str
    words: str
    config: Mapping[str, Any]
    algorithm: str
    quantizer: QuantizerSettings
    divisor: float
    files: tuple[str, ...]

    @cached_property
    def arguments(self) -> Arguments:
        """`config`, as the reader of config.json gives it."""
        return Arguments.of(self.config)

    def scale(self, amax: Tensor, *, in_projections: bool) -> Tensor:
        """The scale as it is stored: `[]` in ModelOpt's files, else `[1]`, or `[heads, 1, 1]`."""
        amax = amax.float()
        scale = amax / torch.full_like(amax, self.divisor)
        return scale.reshape(() if in_projections else (-1, 1, 1) if self is PER_HEAD else (1,))

    def amax(self, scale: Tensor) -> Tensor:
        """The amax that makes this scale: fp32, `[]` or `[heads]`."""
        return amax_of_scale(scale.reshape(-1 if self is PER_HEAD else ()), self.divisor)


PER_TENSOR = CacheFormat(
    "fp8",
    "FP8",
    MappingProxyType(arguments(8, "float", "tensor")),
    "FP8",
    QuantizerSettings((4, 3)),
    FP8_MAX,
    (COMPRESSED_TENSORS, MODELOPT_FORMAT),
)
PER_HEAD = CacheFormat(
    "fp8 per head",
    "FP8, one scale for each head",
    MappingProxyType(arguments(8, "float", "attn_head")),
    "",
    QuantizerSettings((4, 3), axis=2),  # keys and values are [tokens, batch, heads, head_dim]
    FP8_MAX,
    (COMPRESSED_TENSORS,),
)
NVFP4_CACHE = CacheFormat(
    "nvfp4",
    "NVFP4",
    MappingProxyType(arguments(4, "float", "tensor_group", dynamic="local", group_size=16)),
    "NVFP4",
    BLOCKS_OF_E2M1,
    SCALE_RANGE,
    (MODELOPT_FORMAT,),
)
CACHE_FORMATS: Mapping[str, CacheFormat] = MappingProxyType(
    {each.name: each for each in (PER_TENSOR, PER_HEAD, NVFP4_CACHE)}
)


def cache_format_of(words: str) -> str:
    """The name of the format whose quantizers are so described (`input_format`); the description itself if of none."""
    return next((each.name for each in CACHE_FORMATS.values() if each.quantizer.input_format == words), words)


def cache_amax(state: QuantState) -> Iterator[tuple[str, str]]:
    """The amax of all quantizers of the key-value cache, calibrated or not: `….k_bmm_quantizer._amax` and `k`."""
    formats = (f"{quantizer}._amax" for quantizer in state.formats)  # a dynamic one has no amax
    for name in dict.fromkeys((*state.amax, *state.missing, *formats)):
        for letter in _QUANTIZERS:
            if name.endswith(f".{letter}_bmm_quantizer._amax"):
                yield name, letter


@dataclass(frozen=True, slots=True)
class CacheScales:
    """What is written of a key-value cache.

    Args:
        format: None if the cache is not quantized.
        tensors: name of the k or v weight that a scale is written with → name and tensor of the scale.
    """

    format: CacheFormat | None
    tensors: Mapping[str, tuple[str, Tensor]]


def cache_scales(state: QuantState, specs: Mapping[str, TensorSpec], *, files: str = COMPRESSED_TENSORS) -> CacheScales:
    """The scales to write.

    Args:
        files: the format of the files.

    Raises:
        AmaxError: an amax is missing, zero, negative or not finite; all of them are named.
        UsageError: a quantizer of the cache has no format that the files can say, or not that of the others, or its
            layer has no k or v weight.
    """
    scales, unusable, others = dict[str, tuple[str, Tensor]](), list[str](), list[str]()
    found: dict[str, CacheFormat] = {}
    for name, letter in cache_amax(state):
        quantizer = name.removesuffix("._amax")
        attention = quantizer.rpartition(".")[0]
        weight = f"{attention}.{letter}_proj.weight"
        amax, said = state.amax.get(name), state.formats.get(quantizer, PER_TENSOR.name)
        cache = CACHE_FORMATS.get(said)
        if cache is None or files not in cache.files or weight not in specs:
            others.append(f"{quantizer}: {said}{_instead(cache, files)}")
        elif amax is None or not bool(((amax > 0) & (amax < math.inf)).all()):
            unusable.append(f"{name}: {'missing' if amax is None else amax.tolist()}")
        else:
            found.setdefault(cache.name, cache)
            module = weight.removesuffix(".weight") if files == MODELOPT_FORMAT else attention
            scale = cache.scale(amax, in_projections=files == MODELOPT_FORMAT)
            scales[weight] = f"{module}.{letter}_scale", scale
    if others:
        raise UsageError(
            f"{len(others)} quantizers of the key-value cache have no place in format={files}, or their layer has no "
            f"weights of keys and values:{listing(others)}\n"
            "Calibrate with FP8_KV_CFG (one static scale for keys and one for values), or disable them before the "
            "export"
        )
    if len(found) > 1:
        raise UsageError(
            f"the key-value cache is quantized in several formats ({', '.join(found)}), and engines keep all layers in "
            "one\nCalibrate all quantizers of keys and values alike"
        )
    if unusable:
        raise AmaxError(
            f"{len(unusable)} amax of the key-value cache make no scale:{listing(unusable)}\n"
            "Calibrate the model, or disable these quantizers"
        )
    return CacheScales(next(iter(found.values()), None), scales)


def _instead(cache: CacheFormat | None, files: str) -> str:
    if cache is None or files in cache.files:
        return ""
    return f", which engines read from format={cache.files[0]} alone"


def cache_format(said: Arguments | None) -> CacheFormat | None:
    """The format that a `kv_cache_scheme` means; None if none of those known."""
    return next((each for each in CACHE_FORMATS.values() if each.arguments == said), None)


def stored_cache_scales(tensors: Iterable[str], cache: Arguments | None) -> dict[str, str]:
    """The scales of the key-value cache in a checkpoint: name of the quantizer's buffer → name of the scale.

    Args:
        tensors: the names of all tensors.
        cache: `kv_cache_scheme` of config.json, if any. Scales of an unknown one are left out.
    """
    if cache is not None and cache_format(cache) is None:
        return {}
    return {
        f"{name.removesuffix(suffix).removesuffix(f'.{letter}_proj')}.{letter}_bmm_quantizer._amax": name
        for name in tensors
        for letter in _QUANTIZERS
        if name.endswith(suffix := f".{letter}_scale")
    }
