"""How a parameter is stored: plain, or as codes and scales in a Transformer Engine tensor.

Training with FP8 parameters (`--fp8-param-gather`, `fp8_model_init`) keeps weights as `Float8Tensor`,
`Float8BlockwiseQTensor`, `MXFP8Tensor` or `NVFP4Tensor`. They have the shape and dtype of the model's weights, but hold
codes and scales. Only this file knows them, by their attributes; nothing imports Transformer Engine.

Attributes and layouts: transformer_engine.pytorch.tensor.storage, 2.20.2.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amaxbridge.bridge.live.model_walk import Parameter
from amaxbridge.bridge.plan.stored_blocks import BLOCK
from amaxbridge.export.schemes.targets import is_targeted
from amaxbridge.mappings.amax import stored_scales_name
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.registry import MappingRegistry

_MX_BLOCK = 32  # columns that share a scale in MXFP8Tensor


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """The codes and scales of a parameter that a scheme can write unchanged.

    Args:
        format: a quantizer format, `fp8_block` or `mxfp8`.
        codes: E4M3, `[out, in]`.
        scales: factors of the codes, one row for each row of codes: fp32 `[out, ⌈in/128⌉]`, the same in all rows of a
            block, or uint8 exponents (E8M0) `[out, in/32]`.
    """

    format: str
    codes: Tensor
    scales: Tensor


def is_quantized(tensor: Any) -> bool:
    """True if a parameter is stored as codes and scales."""
    return hasattr(tensor, "_quantizer") and callable(getattr(tensor, "dequantize", None))


def plain(tensor: Tensor) -> Tensor:
    """The values of a parameter in the model's dtype."""
    tensor = tensor.detach()
    return tensor.dequantize() if is_quantized(tensor) else tensor


def fill(parameter: Any, values: Tensor) -> None:
    """Copies values into a parameter; a quantized parameter quantizes them.

    Transformer Engine keeps the initial values of a quantized parameter in high precision, and Megatron's distributed
    optimizer makes its main parameters from them (`get_high_precision_init_val`): they are replaced too.
    """
    with torch.no_grad():
        parameter.copy_(values)
        initial = getattr(parameter, "get_high_precision_init_val", None)
        kept = initial() if initial is not None else None
        if kept is not None:
            kept.copy_(values)


class PlainTensors(Mapping[str, Tensor]):
    """Parameters by name, each dequantized when it is read."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._tensors = {parameter.name: parameter.tensor for parameter in parameters}

    def __getitem__(self, name: str) -> Tensor:
        return plain(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def as_stored(
    parameters: Iterable[Parameter], registry: MappingRegistry, ignore: Collection[str], quantizers: Collection[str]
) -> tuple[list[Parameter], list[str]]:
    """The parameters of a rank, with codes, and scales under a name of their own, in place of a quantized parameter.

    Args:
        ignore: Hugging Face modules whose weights are dequantized.
        quantizers: names of enabled quantizers; a weight that one of them quantizes is dequantized too.

    Returns:
        The parameters, and one line for each that no scheme can write unchanged.
    """
    held, problems = list[Parameter](), list[str]()
    for parameter in parameters:
        mapping = registry.megatron_to_hf_lookup(parameter.name) if is_quantized(parameter.tensor) else None
        scales = stored_scales_name(parameter.name)
        own = module_of(scales)
        ignored = mapping is None or any(is_targeted(module_of(target), ignore) for target in mapping.targets)
        if ignored or own in quantizers or own.rstrip("0123456789").rstrip(".") in quantizers:
            held.append(parameter)
            continue
        stored = stored_codes(parameter.tensor)
        if isinstance(stored, str):
            problems.append(f"{parameter.name}: {stored}")
        else:
            held += [Parameter(parameter.name, stored.codes), Parameter(scales, stored.scales)]
    return held, problems


def stored_codes(tensor: Any) -> StoredCodes | str:
    """The codes and scales of a quantized parameter, or the reason why no scheme can write them unchanged."""
    codes, scales = getattr(tensor, "_rowwise_data", None), getattr(tensor, "_rowwise_scale_inv", None)
    kind = getattr(getattr(tensor, "_fp8_dtype", None), "name", "")
    if codes is None or scales is None:
        return f"{type(tensor).__name__} has one scale for the whole tensor, or only its columns are quantized"
    if kind != "kFloat8E4M3":
        return f"{type(tensor).__name__} has codes other than E4M3"
    codes = codes.detach().view(torch.float8_e4m3fn)
    if getattr(tensor, "_is_2D_scaled", False):
        across = -(-codes.shape[1] // BLOCK)
        rows = scales.detach()[:, :across].repeat_interleave(BLOCK, 0)
        return StoredCodes("fp8_block", codes, rows[: len(codes)])
    if hasattr(tensor, "_is_2D_scaled"):
        return f"{type(tensor).__name__} has scales for 128 elements of a row, not for square blocks"
    if getattr(tensor, "_with_gemm_swizzled_scales", None) is False and scales.dtype == torch.uint8:
        return StoredCodes("mxfp8", codes, scales.detach()[: len(codes), : codes.shape[1] // _MX_BLOCK])
    return f"{type(tensor).__name__} has its scales in the order of a kernel"
