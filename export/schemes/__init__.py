"""The quantization formats, one file each, and how the rest of the program sees them."""

from collections.abc import Mapping, Sequence
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
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.export.schemes.w4a16_asym import w4a16_asym
from amaxbridge.export.schemes.w8a8 import W8A8
from amaxbridge.mappings.errors import UsageError

__all__ = ["SCHEMES", "FromQuantizers", "Groups", "Recipe", "Scheme", "SchemeGroup", "find_scheme", "named_scheme"]

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        NVFP4(), NVFP4A16, MXFP4, MXFP4A16, MXFP8, MXFP8A16, FP8, FP8_DYNAMIC, FP8_BLOCK, w4a16(), w4a16_asym(), W8A8
    )
}  # fmt: skip


def find_scheme(scheme: Any, ignore: Sequence[str] = ()) -> Recipe | None:
    """What users call a scheme.

    Args:
        scheme: a name, ours or of compressed-tensors' presets (`fp8_dynamic`, `FP8_DYNAMIC`); `auto`, to read it
            from the quantizers; `none` or None, to write the weights as they are; a `QuantizationScheme` of its; a
            `Recipe`.
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
        return FromQuantizers(tuple(SCHEMES.values()), tuple(ignore))
    return Groups.of(named_scheme(scheme), ignore)


def named_scheme(name: str, group_size: int | None = None) -> Scheme:
    """One scheme by its name.

    Args:
        group_size: columns that share a scale, where the scheme leaves them open.

    Raises:
        UsageError: there is none such; lists those there are.
    """
    lower = name.lower()
    known = {"int8": "w8a8"}.get(lower, lower)
    if known not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}; known: {', '.join(SCHEMES)}, auto, none")
    if group_size is None:
        return SCHEMES[known]
    sized = {"w4a16": w4a16, "w4a16_asym": w4a16_asym}
    if known not in sized:
        raise UsageError(f"scheme {name} has blocks of its own: group_size is for {', '.join(sized)}")
    return sized[known](group_size)


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
