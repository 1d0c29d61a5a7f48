"""The quantization formats, one file each, and how the rest of the program sees them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from amaxbridge.export.schemes.fp8 import FP8
from amaxbridge.export.schemes.fp8_block import FP8_BLOCK
from amaxbridge.export.schemes.fp8_dynamic import FP8_DYNAMIC
from amaxbridge.export.schemes.modelopt import algorithms, in_modelopt, modelopt_schemes, scheme_of_algorithm
from amaxbridge.export.schemes.mxfp4 import MXFP4, MXFP4A16
from amaxbridge.export.schemes.mxfp8 import MXFP8, MXFP8A16
from amaxbridge.export.schemes.nvfp4 import NVFP4
from amaxbridge.export.schemes.nvfp4a16 import NVFP4A16
from amaxbridge.export.schemes.packed_integers import WHOLE_ROW
from amaxbridge.export.schemes.quantizer_settings import settings_key
from amaxbridge.export.schemes.recipe import FORMATS, FromQuantizers, Groups, Recipe, SchemeGroup, in_format
from amaxbridge.export.schemes.scheme import COMPRESSED_TENSORS, MODELOPT_FORMAT, SCALES, UE8M0, Scheme
from amaxbridge.export.schemes.signature import Arguments, Signature
from amaxbridge.export.schemes.targets import EVERY_LINEAR
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.export.schemes.w4a16_asym import w4a16_asym
from amaxbridge.export.schemes.w4afp8 import w4afp8
from amaxbridge.export.schemes.w8a8 import W8A8
from amaxbridge.export.schemes.w8a16 import w8a16
from amaxbridge.mappings.errors import UsageError

__all__ = [
    "COMPRESSED_TENSORS",
    "FORMATS",
    "MODELOPT_FORMAT",
    "SCHEMES",
    "FromQuantizers",
    "Groups",
    "Recipe",
    "Scheme",
    "SchemeGroup",
    "algorithms",
    "find_scheme",
    "from_quantizers",
    "has_group_size",
    "has_scales",
    "modelopt_schemes",
    "named_scheme",
    "quantizer_format",
    "scheme_of",
    "scheme_of_algorithm",
    "variants",
]  # fmt: skip

_REGISTERED: tuple[Scheme, ...] = (
    NVFP4,
    NVFP4A16,
    MXFP4,
    MXFP4A16,
    MXFP8,
    MXFP8A16,
    FP8,
    FP8_DYNAMIC,
    FP8_BLOCK,
    w4a16(),
    w4a16_asym(),
    W8A8,
    w8a16(),
    w4afp8(),
)
"""Every scheme. If several fit the same quantizers, `scheme=auto` takes the first."""

SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in _REGISTERED})


def find_scheme(scheme: Any, ignore: Sequence[str] = (), format: str = COMPRESSED_TENSORS) -> Recipe | None:
    """Returns the recipe for what users give as a scheme.

    Args:
        scheme: a name, ours or of compressed-tensors' presets (`fp8_dynamic`, `FP8_DYNAMIC`); `auto`, to read it
            from the quantizers; `none` or None, to write plain weights; a `QuantizationScheme` of compressed-tensors; a
            `Recipe`, such as `Groups.of(named_scheme("w4a16", group_size=64))`.
        ignore: modules to leave unquantized: full names and `re:` patterns.
        format: the format of the files: `compressed-tensors` or `modelopt`.

    Returns:
        The recipe; None for plain weights.

    Raises:
        UsageError: unknown scheme or format; the message lists the known ones. Or the format lacks the scheme.
    """
    return in_format(_found(scheme, ignore), format)


def _found(scheme: Any, ignore: Sequence[str]) -> Groups | FromQuantizers | None:
    if scheme is None:
        return None
    if isinstance(scheme, Groups | FromQuantizers):
        return replace(scheme, ignore=(*scheme.ignore, *ignore))
    if not isinstance(scheme, str):
        found = scheme_of(_signature_of(scheme))
        if found is None:
            raise UsageError(f"no scheme writes {scheme!r}; known: {', '.join(SCHEMES)}")
        return Groups((SchemeGroup(found, tuple(scheme.targets) or (EVERY_LINEAR,)),), tuple(ignore))
    if scheme.lower() == "none":
        return None
    if scheme.lower() == "auto":
        return from_quantizers(ignore)
    return Groups.of(named_scheme(scheme), ignore)


def from_quantizers(ignore: Sequence[str] = ()) -> FromQuantizers:
    """The recipe of `scheme=auto`: any scheme, in any of its group sizes and for whole rows."""
    sized = (scheme for name in SCHEMES for scheme in variants(name)[1:])
    return FromQuantizers((*SCHEMES.values(), *sized), tuple(ignore))


def has_group_size(name: str) -> bool:
    """True if users choose how many columns share a scale in this scheme."""
    return name.lower() in SCHEMES and bool(SCHEMES[name.lower()].group_sizes)


def has_scales(name: str) -> bool:
    """True if users choose the numbers that scales are rounded up to in this scheme."""
    return name.lower() in SCHEMES and SCHEMES[name.lower()].with_scales(UE8M0) is not None


def named_scheme(name: str, group_size: int | None = None, scales: str | None = None) -> Scheme:
    """Returns a scheme by its name.

    Args:
        group_size: columns that share a scale: 32, 64 or 128, in schemes that have `group_sizes`. None for 128 there,
            and in schemes whose blocks are fixed.
        scales: `ue8m0` to round scales up to powers of two, in `fp8_block`; None for the format's own.

    Raises:
        UsageError: unknown name, or a size or scales that the scheme does not have. The message lists the known ones.
    """
    lower = name.lower()
    known = SCHEMES.get({"int8": "w8a8"}.get(lower, lower))
    if known is None:
        raise UsageError(f"unknown scheme {name!r}; known: {', '.join(SCHEMES)}, auto, none")
    if scales is not None:
        known = _with_scales(known, scales)
    if group_size is None:
        return known
    if not known.group_sizes:
        sized = ", ".join(scheme.name for scheme in SCHEMES.values() if scheme.group_sizes)
        raise UsageError(f"scheme {name} has blocks of its own: group_size is for {sized}")
    found = known.with_group_size(group_size) if group_size in known.group_sizes else None
    if found is None:
        sizes = ", ".join(map(str, known.group_sizes))
        raise UsageError(f"group_size={group_size}: engines have kernels for {name} in groups of {sizes} columns")
    return found


def _with_scales(scheme: Scheme, scales: str) -> Scheme:
    if scales not in SCALES:
        raise UsageError(f"unknown scales {scales!r}; known: {', '.join(SCALES)}")
    found = scheme.with_scales(scales)
    if found is None:
        having = ", ".join(filter(has_scales, SCHEMES))
        raise UsageError(f"scheme {scheme.name} has scales of its own: {scales} is for {having}")
    return found


def variants(name: str) -> tuple[Scheme, ...]:
    """A scheme in every size of groups that it can have: its own first, whole rows last."""
    scheme = SCHEMES[name]
    sizes = (*scheme.group_sizes, WHOLE_ROW) if scheme.group_sizes else ()
    return (scheme, *(found for size in sizes if (found := scheme.with_group_size(size)) is not None))


def scheme_of(signature: Signature, *, weights_only: bool = False) -> Scheme | None:
    """The scheme that a config group describes; None if there is none.

    Args:
        signature: the group's signature. Of several schemes, one with its `quant_format` is preferred.
        weights_only: True to compare the weights alone.
    """
    weights = replace(signature.weights, actorder=None) if _keeps_order(signature.weights) else signature.weights
    fitting = [
        scheme
        for scheme in _sized(weights.group_size)
        if scheme.signature.weights == weights and (weights_only or scheme.signature.inputs == signature.inputs)
    ]
    exact = (scheme for scheme in fitting if scheme.signature.quant_format == signature.quant_format)
    found = next(exact, next(iter(fitting), None))
    return in_modelopt(found) if found is not None and signature.quant_format == MODELOPT_FORMAT else found


def quantizer_format(num_bits: Any, axis: Any, block_sizes: Mapping[Any, Any] | None) -> str | None:
    """The name in a `QuantState` for weights whose quantizer has these attributes; None if no scheme writes them."""
    key = settings_key(num_bits, axis, block_sizes)
    for scheme in _sized((block_sizes or {}).get(-1)):
        if scheme.weight_quantizer is not None and scheme.weight_quantizer.key == key:
            return scheme.format
    return None


def _sized(group_size: int | None) -> Iterator[Scheme]:
    """All schemes, then those with a free group size at this size; None means whole rows."""
    yield from SCHEMES.values()
    resized = (scheme.with_group_size(group_size or WHOLE_ROW) for scheme in SCHEMES.values())
    yield from (scheme for scheme in resized if scheme is not None)


def _keeps_order(weights: Arguments) -> bool:
    """True if the stored tensors do not depend on the order in which GPTQ processed the columns."""
    return weights.actorder == "weight"


def _signature_of(wanted: Any) -> Signature:
    """The signature of a `QuantizationScheme`, read by attribute: importing its library takes seconds."""
    return Signature(
        _plain(getattr(wanted, "format", None)) or "",
        _arguments_of(wanted.weights, wanted),
        None if wanted.input_activations is None else _arguments_of(wanted.input_activations, wanted),
    )


def _arguments_of(found: Any, wanted: Any) -> Arguments:
    if found is None:
        raise UsageError(f"no scheme writes {wanted!r}: it has no weights")
    names = ("num_bits", "type", "strategy", "dynamic", "symmetric", "group_size", "block_structure", "actorder")
    return Arguments.of({name: _plain(getattr(found, name, None)) for name in names})


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
