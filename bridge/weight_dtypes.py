"""The dtypes that weights may have, as options and config.json name them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from amaxbridge.mappings.errors import UsageError

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Name → dtype."""

DTYPE_FIELDS = ("dtype", "torch_dtype")
"""The fields of config.json that name a dtype, in any part of it: the newer first."""


def dtype_option(option: str, name: "str | torch.dtype") -> torch.dtype:
    """The dtype that an option names; torch's own is one, too.

    Raises:
        UsageError: unknown name. The message lists the known ones.
    """
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"unknown {option}={name}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def is_rounded(source: torch.dtype, target: torch.dtype) -> bool:
    """True if values of one float dtype may change in another."""
    return source.is_floating_point and target.is_floating_point and torch.promote_types(source, target) != target


def stated_dtype(config: Mapping[str, Any], part: str | None) -> torch.dtype | None:
    """The dtype that config.json states for the language model, None if it states none.

    Args:
        config: config.json as it is on the disk.
        part: the field with the language model's own configuration, which comes first; None if there is none.

    Raises:
        UsageError: it is no dtype of weights, or two fields contradict each other. The message names the fields.
    """
    for prefix, fields in ((f"{part}.", config.get(part) or {}), ("", config)) if part else (("", config),):
        stated = {f"{prefix}{field}": _dtype(prefix + field, fields[field]) for field in _stated(fields)}
        if len(set(stated.values())) > 1:
            both = " and ".join(f"{field}={fields[field.removeprefix(prefix)]}" for field in stated)
            raise UsageError(f"config.json says {both}: correct it, or give dtype=")
        if stated:
            return next(iter(stated.values()))
    return None


def check_known_to_torch(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raises UsageError if a part of config.json names a dtype that torch lacks, which transformers would fail on.

    Args:
        where: the file, for the message.
    """
    for field in _stated(config):
        name = config[field]
        if isinstance(name, str) and not isinstance(getattr(torch, name, None), torch.dtype):
            raise UsageError(f"{where}: {field}={_shown(name)} is no dtype; known: {', '.join(DTYPES)}; correct it")
    for name, part in config.items():
        if isinstance(part, Mapping):
            check_known_to_torch(part, f"{where}: {name}")


def _stated(fields: Mapping[str, Any]) -> Iterator[str]:
    return (field for field in DTYPE_FIELDS if fields.get(field) is not None)


def _shown(name: object) -> str:
    """What a field holds, without characters that would not print."""
    return name if isinstance(name, str) and name.isprintable() else repr(name)


def _dtype(field: str, name: object) -> torch.dtype:
    found = DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise UsageError(
            f"config.json says {field}={_shown(name)}, which is no dtype of weights; known: {', '.join(DTYPES)}: "
            "correct it, or give dtype="
        )
    return found
