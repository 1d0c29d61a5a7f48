"""Which group of `config_groups` a module belongs to, or that it is ignored: the rules of a serving engine.

A target or an entry of `ignore` means a module by its full name, by `re:` and a pattern that matches from the beginning
of its name, or by the class of its layer. Nothing matches by a part of a name: `layers.1` is not `layers.10`.

An engine runs q, k and v as one layer, `qkv_proj`, which no checkpoint names. Such a layer is asked about by its
members, who must agree. Where some are ignored, or in another group, one GEMM would need two formats: an error by name.
An engine's name literally in `ignore` counts too (vLLM's `should_ignore_layer`); a pattern does not, so
`re:.*up_proj` does not ignore half of `gate_up_proj` unseen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from amaxbridge.export.schemes.recipe import EVERY_LINEAR, is_named
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.fused_groups import group_of

LINEAR = (EVERY_LINEAR,)
_PRIMARY_OF: Mapping[str, str] = MappingProxyType(
    {
        "qkv_proj": "q_proj",
        "gate_up_proj": "gate_proj",
        "w13": "w1",
        "fused_qkv_a_proj": "q_a_proj",
        "in_proj_qkvz": "in_proj_qkv",
        "in_proj_ba": "in_proj_b",
    }
)
"""How engines call a fused layer → its first member. The members are those of `mappings.fused_groups`."""


def members_of(module: str) -> tuple[str, ...]:
    """The modules of the checkpoint that an engine's layer is made of, in order; itself where it is not fused."""
    parent, dot, projection = module.rpartition(".")
    if projection not in _PRIMARY_OF:
        return (module,)
    return group_of(parent + dot + _PRIMARY_OF[projection]).members


def fused_name(module: str) -> str:
    """The engine's layer that a module of the checkpoint is part of; its own name where it is fused with no other."""
    parent, dot, _ = module.rpartition(".")
    primary = group_of(module).primary
    return next((parent + dot + name for name, first in _PRIMARY_OF.items() if parent + dot + first == primary), module)


@dataclass(frozen=True, slots=True)
class Matching:
    """The targets of each config group, in order, and what is ignored."""

    targets: tuple[tuple[str, ...], ...] = (LINEAR,)
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, quantization_config: Mapping[str, Any]) -> "Matching":
        """From the `quantization_config` of config.json."""
        groups = quantization_config.get("config_groups", {}).values()
        ignore = quantization_config.get("ignore") or ()
        return cls(tuple(tuple(group["targets"]) for group in groups), tuple(ignore))

    def is_ignored(self, module: str, classes: Sequence[str] = LINEAR) -> bool:
        """Whether `ignore` means a module of the checkpoint."""
        return _means(self.ignore, module, classes)

    def groups_targeting(self, module: str, classes: Sequence[str] = LINEAR) -> list[int]:
        """Every group that targets a module of the checkpoint. In a sound config that is one, or none and it is
        ignored.
        """
        return [number for number, targets in enumerate(self.targets) if _means(targets, module, classes)]

    def group_of(self, layer: str, classes: Sequence[str] = LINEAR) -> int | None:
        """The group of an engine's layer, None to leave it unquantized: ignored, or no target.

        Of several groups the first that names the layer, else the first that means its class, as in vLLM.

        Args:
            layer: full name, of a module of the checkpoint or of a fused layer.
            classes: names that targets may call the class of the layer; `Linear` unless it is none.

        Raises:
            CheckpointError: members of a fused layer differ; names each and its group.
        """
        if layer in self.ignore:
            return None
        found = {member: self._group_of_one(member, classes) for member in members_of(layer)}
        if len(set(found.values())) > 1:
            rows = [f"{name}: {'not quantized' if at is None else f'group_{at}'}" for name, at in found.items()]
            raise CheckpointError(
                f"{layer} runs as one layer, and config.json treats its parts differently:{listing(rows)}\n"
                "Give all of them one config group, or ignore all of them"
            )
        return next(iter(found.values()))

    def _group_of_one(self, module: str, classes: Sequence[str]) -> int | None:
        if self.is_ignored(module, classes):
            return None
        named = (number for number, targets in enumerate(self.targets) if is_named(module, targets))
        return next(named, next(iter(self.groups_targeting(module, classes)), None))


def _means(targets: Iterable[str], module: str, classes: Sequence[str]) -> bool:
    targets = tuple(targets)
    return is_named(module, targets) or any(target in classes for target in targets)
