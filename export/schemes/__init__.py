"""The quantization formats, one file each, and how the rest of the program sees them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from amaxbridge.export.schemes.fp8 import FP8
from amaxbridge.export.schemes.fp8_block import FP8_BLOCK
from amaxbridge.export.schemes.fp8_dynamic import FP8_DYNAMIC
from amaxbridge.export.schemes.mxfp4 import MXFP4, MXFP4A16
from amaxbridge.export.schemes.mxfp8 import MXFP8, MXFP8A16
from amaxbridge.export.schemes.nvfp4 import NVFP4
from amaxbridge.export.schemes.nvfp4a16 import NVFP4A16
from amaxbridge.export.schemes.recipe import EVERY_LINEAR, FromQuantizers, Groups, Recipe, SchemeGroup
from amaxbridge.export.schemes.scheme import Scheme
from amaxbridge.export.schemes.w4a16 import GROUP_SIZES, w4a16
from amaxbridge.export.schemes.w4a16_asym import w4a16_asym
from amaxbridge.export.schemes.w8a8 import W8A8
from amaxbridge.mappings.errors import UsageError

__all__ = [
    "SCHEMES", "FromQuantizers", "Groups", "Recipe", "Scheme", "SchemeGroup", "find_scheme", "from_quantizers",
    "has_group_size", "named_scheme",
]  # fmt: skip

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        NVFP4(), NVFP4A16, MXFP4, MXFP4A16, MXFP8, MXFP8A16, FP8, FP8_DYNAMIC, FP8_BLOCK, w4a16(), w4a16_asym(), W8A8
    )
}  # fmt: skip
_SIZED: Mapping[str, Callable[[int], Scheme]] = {"w4a16": w4a16, "w4a16_asym": w4a16_asym}


def find_scheme(scheme: Any, ignore: Sequence[str] = ()) -> Recipe | None:
    """What users call a scheme.

    Args:
        scheme: a name, ours or of compressed-tensors' presets (`fp8_dynamic`, `FP8_DYNAMIC`); `auto`, to read it
            from the quantizers; `none` or None, to write the weights as they are; a `QuantizationScheme` of its; a
            `Recipe`, such as `Groups.of(named_scheme("w4a16", group_size=64))`.
        ignore: modules that are left as they are: full names and `re:` patterns.

    Returns:
        None for weights as they are.

    Raises:
        UsageError: there is none such; lists those there are.
    """
    if scheme is None:
        return None
    if isinstance(scheme, Groups | FromQuantizers):
        return replace(scheme, ignore=(*scheme.ignore, *ignore))
    if not isinstance(scheme, str):
        group = SchemeGroup(_of_compressed_tensors(scheme), tuple(scheme.targets) or (EVERY_LINEAR,))
        return Groups((group,), tuple(ignore))
    if scheme.lower() == "none":
        return None
    if scheme.lower() == "auto":
        return from_quantizers(ignore)
    return Groups.of(named_scheme(scheme), ignore)


def from_quantizers(ignore: Sequence[str] = ()) -> FromQuantizers:
    """The recipe of `scheme=auto`: any scheme, in any of its group sizes."""
    sized = (scheme(size) for scheme in _SIZED.values() for size in GROUP_SIZES)
    return FromQuantizers((*SCHEMES.values(), *sized), tuple(ignore))


def has_group_size(name: str) -> bool:
    """True if users choose how many columns share a scale in this scheme."""
    return name.lower() in _SIZED


def named_scheme(name: str, group_size: int | None = None) -> Scheme:
    """One scheme by its name.

    Args:
        group_size: columns that share a scale: 32, 64 or 128, in `w4a16` and `w4a16_asym`. None for 128 there, and
            in schemes whose blocks are fixed.

    Raises:
        UsageError: unknown name, or a size that the scheme does not have. The message lists the known ones.
    """
    lower = name.lower()
    known = {"int8": "w8a8"}.get(lower, lower)
    if known not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}; known: {', '.join(SCHEMES)}, auto, none")
    if group_size is None:
        return SCHEMES[known]
    if not has_group_size(known):
        raise UsageError(f"scheme {name} has blocks of its own: group_size is for {', '.join(_SIZED)}")
    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise UsageError(f"group_size={group_size}: engines have kernels for {name} in groups of {sizes} columns")
    return _SIZED[known](group_size)


def _of_compressed_tensors(wanted: Any) -> Scheme:
    """The scheme that a `QuantizationScheme` describes. Read by its attributes: importing its library takes seconds."""
    size = getattr(wanted.weights, "group_size", None)
    more: tuple[Scheme, ...] = (w4a16(size), w4a16_asym(size)) if size else ()
    for scheme in (*SCHEMES.values(), *more):
        group = scheme.config_group
        if all(_says(getattr(wanted, part), group[part]) for part in ("weights", "input_activations")):
            return scheme
    raise UsageError(f"no scheme writes {wanted!r}; known: {', '.join(SCHEMES)}")


def _says(wanted: Any, arguments: Mapping[str, Any] | None) -> bool:
    if wanted is None or arguments is None:
        return wanted is arguments is None
    values = {key: getattr(wanted, key) for key in arguments if key != "scale_dtype"}
    return all(getattr(value, "value", value) == arguments[key] for key, value in values.items())
