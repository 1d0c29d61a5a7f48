"""The `quantization_config` of config.json as the rules see it; what is malformed in it is left out, and reported."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from amaxbridge.export.schemes import Groups, Scheme, find_scheme
from amaxbridge.export.schemes.recipe import EMBEDDINGS, EVERY_LINEAR
from amaxbridge.mappings.errors import UsageError

HEAD = "lm_head"
_DEFAULTS: Mapping[str, Any] = {  # of compressed-tensors' QuantizationArgs
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "dynamic": False,
}


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """One entry of `config_groups`.

    Args:
        name: its key.
        targets: as they stand there.
        weights: arguments of the weights, and `inputs` of the activations; None for none.
        format: on the disk.
        scheme: the one that these arguments are, None for an unknown one.
    """

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any] | None
    inputs: Mapping[str, Any] | None
    format: str | None
    scheme: Scheme | None

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> "ConfigGroup":
        weights, inputs = (_mapping(entry.get(part)) for part in ("weights", "input_activations"))
        targets = tuple(str(target) for target in entry.get("targets") or ())
        return cls(name, targets, weights, inputs, entry.get("format"), _scheme(weights, inputs))


@dataclass(frozen=True, slots=True)
class Quantization:
    """`config_groups` in order, and `ignore`. `raw` is all of it; empty where a checkpoint is not quantized."""

    raw: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[ConfigGroup, ...] = ()
    ignore: tuple[str, ...] = ()
    _ignored_names: frozenset[str] = frozenset()
    _patterns: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any) -> "Quantization":
        raw = _mapping(config) or {}
        entries = _mapping(raw.get("config_groups")) or {}
        groups = tuple(ConfigGroup.of(name, entry) for name, entry in entries.items() if isinstance(entry, dict))
        ignore = tuple(str(entry) for entry in raw.get("ignore") or ())
        patterns = tuple(entry for entry in ignore if entry.startswith("re:"))
        return cls(raw, groups, ignore, frozenset(ignore), patterns)

    def group_of(self, module: str) -> int | None:
        """The group that targets a module of the checkpoint: by name, else by class. `ignore` is not asked."""
        named = self.named_by(module)
        is_linear = not module.endswith((*EMBEDDINGS, HEAD))
        return self.every_linear() if named is None and is_linear else named

    def ignored_by(self, module: str) -> str | None:
        """The entry of `ignore` that means a module: its name, or a pattern for it. There may be thousands of names."""
        if module in self._ignored_names:
            return module
        return next((entry for entry in self._patterns if means(entry, module)), None)

    def named_by(self, module: str) -> int | None:
        """The first group with a target that is the module's name, or a pattern for it."""
        for number, group in enumerate(self.groups):
            if any(means(target, module) for target in group.targets):
                return number
        return None

    def every_linear(self) -> int | None:
        """The first group whose target is the class."""
        return next((number for number, group in enumerate(self.groups) if EVERY_LINEAR in group.targets), None)


def means(target: str, name: str) -> bool:
    """Whether a target is a name, or a `re:` pattern that matches from its beginning."""
    if not target.startswith("re:"):
        return target == name
    compiled = _compiled(target)
    return compiled is not None and compiled.match(name) is not None


def is_sound(target: str) -> bool:
    """Whether it is a name or a class, or a pattern that compiles."""
    return not target.startswith("re:") or _compiled(target) is not None


@lru_cache(maxsize=4096)
def _compiled(target: str) -> re.Pattern[str] | None:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error:
        return None  # the rule on patterns says so


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) else None


def _scheme(weights: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None) -> Scheme | None:
    wanted = SimpleNamespace(
        targets=(),
        weights=None if weights is None else SimpleNamespace(**{**_DEFAULTS, **weights}),
        input_activations=None if inputs is None else SimpleNamespace(**{**_DEFAULTS, **inputs}),
    )
    try:
        recipe = find_scheme(wanted)
    except UsageError:
        return None
    assert isinstance(recipe, Groups)
    return recipe.groups[0].scheme
