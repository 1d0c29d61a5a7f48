"""Which scheme wrote each module, read from `quantization_config` in config.json."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from export.schemes import Groups, Scheme, find_scheme
from export.schemes.recipe import is_named, is_targeted
from mappings.errors import UsageError


class _Arguments(dict[str, Any]):
    """Arguments of a config group, by attribute: what is not there is None."""

    __getattr__ = dict.get


def schemes_of(quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """Module → its scheme; modules of a format that is not known here are left out."""
    groups = [
        (scheme, tuple(group.get("targets") or ()))
        for group in (quantization_config.get("config_groups") or {}).values()
        if (scheme := _scheme(group)) is not None
    ]
    ignore = tuple(quantization_config.get("ignore") or ())
    found = {}
    for module in modules:
        if not is_named(module, ignore):
            scheme = next((scheme for scheme, targets in groups if is_targeted(module, targets)), None)
            if scheme is not None:
                found[module] = scheme
    return found


def _scheme(group: Mapping[str, Any]) -> Scheme | None:
    parts = {key: group.get(key) for key in ("weights", "input_activations")}
    arguments = {key: None if part is None else _Arguments(part) for key, part in parts.items()}
    try:
        recipe = find_scheme(SimpleNamespace(**arguments, targets=()))
    except UsageError:
        return None
    return recipe.groups[0].scheme if isinstance(recipe, Groups) else None
