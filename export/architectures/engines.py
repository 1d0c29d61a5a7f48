"""What each engine makes of a layer: its config group, by `targets` and `ignore`.

Engines read one config by different rules. The differences are the fields of `Engine`; reading is one function.

An engine runs q, k and v as one layer, `qkv_proj`, which no checkpoint names. Such a layer is asked about by its
members, who must agree: if some are ignored, or in another group, one GEMM would need two formats. An engine's own name
counts in `ignore` if it stands there literally (vLLM's `should_ignore_layer`); a pattern does not count, so
`re:.*up_proj` does not ignore half of `gate_up_proj` unseen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from amaxbridge.export.quant_config import QuantConfig
from amaxbridge.export.schemes.targets import EVERY_LINEAR, HEAD, is_pattern, means
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
"""What engines call a fused layer → its first member. The members are those of `mappings.fused_groups`."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine reads targets and `ignore`.

    Args:
        fuses: runs fused groups as one layer.
        targets_fused_names: tries targets on the fused layer's own name, then on its class, and only then on its
            members; so `re:.*up_proj` hits `gate_up_proj` and decides for the gate, too.
        ignores_parts: an entry of `ignore` counts if a name contains it: `model.layers.0.mlp.gate`, a router, also
            means `model.layers.0.mlp.gate_proj`.
        ignores_classes: `Linear` in `ignore` means every linear module.
        head_is_linear: `Linear` targets the head.
        asks_first_expert: what the projections of the first expert get, all experts get.
        refuses_untargeted: raises for a layer that is neither targeted nor ignored; older vLLM too.
    """

    name: str
    fuses: bool = True
    targets_fused_names: bool = False
    ignores_parts: bool = False
    ignores_classes: bool = False
    head_is_linear: bool = False
    asks_first_expert: bool = False
    refuses_untargeted: bool = False


VLLM = Engine("vLLM", targets_fused_names=True, asks_first_expert=True, refuses_untargeted=True)
SGLANG = Engine(
    "SGLang", targets_fused_names=True, ignores_parts=True, asks_first_expert=True, refuses_untargeted=True
)  # fmt: skip
TRANSFORMERS = Engine("transformers", fuses=False, ignores_classes=True, head_is_linear=True)
RUNTIME = Engine("amaxbridge.export.runtime", ignores_classes=True, head_is_linear=True)
"""Our own, which loads models of transformers."""
ENGINES = (VLLM, SGLANG, TRANSFORMERS)
"""The engines that serve checkpoints: vLLM 0.33, SGLang 0.5.23, transformers 5.24."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as an engine has it: its name there, and the modules of the checkpoint that it is made of."""

    name: str
    members: tuple[str, ...]

    @classmethod
    def named(cls, name: str) -> "Layer":
        """The layer of an engine, fused or not."""
        return cls(name, members_of(name))


@dataclass(frozen=True, slots=True)
class Reading:
    """What an engine makes of a layer: a config group, or None and why; or a conflict that stops the load.

    Args:
        members: what each member would get by itself, where they are in conflict.
    """

    group: int | None = None
    why: str = ""
    conflict: str = ""
    members: Mapping[str, int | None] = field(default_factory=dict)


def members_of(layer: str) -> tuple[str, ...]:
    """The modules of the checkpoint that an engine's layer is made of, in order; itself if it is not fused."""
    parent, dot, projection = layer.rpartition(".")
    if projection not in _PRIMARY_OF:
        return (layer,)
    return group_of(parent + dot + _PRIMARY_OF[projection]).members


def fused_name(module: str) -> str:
    """The engine's layer that a module of the checkpoint is part of; its own name if it is fused with no other."""
    parent, dot, _ = module.rpartition(".")
    primary = group_of(module).primary
    return next((parent + dot + name for name, first in _PRIMARY_OF.items() if parent + dot + first == primary), module)


def read_layer(engine: Engine, layer: Layer, config: QuantConfig, classes: tuple[str, ...] = LINEAR) -> Reading:
    """What the engine makes of the layer.

    Args:
        classes: what targets may call the layer's class. `Linear` does not mean the head, except in engines to which
            it is a linear layer as any other.
    """
    if layer.name.endswith(HEAD) and not engine.head_is_linear:
        classes = tuple(name for name in classes if name != EVERY_LINEAR)
    ignored = {each: entry for each in layer.members if (entry := _ignored(engine, each, config, classes)) is not None}
    if layer.name in config.ignore or len(ignored) == len(layer.members):
        return Reading(why=f"ignored by {next(iter(ignored.values()), layer.name)!r}")
    by_class, is_fused = config.of_class(classes), len(layer.members) > 1
    if engine.targets_fused_names and is_fused and not ignored:
        if (group := config.named_by(layer.name)) is not None:
            return Reading(group, f"{_target(config, group, layer.name)!r} hits {layer.name}")
        if by_class is not None:
            return Reading(by_class)
    named = {member: config.named_by(member) for member in layer.members}
    groups = {member: by_class if group is None else group for member, group in named.items()}
    groups |= dict.fromkeys(ignored)
    if ignored:
        spared = ", ".join(f"{name} by {entry!r}" for name, entry in ignored.items())
        return Reading(conflict=f"ignored in part: {spared}", members=groups)
    first = next(iter(groups.values()))
    if len(set(groups.values())) > 1:
        found = ", ".join(f"{name}: {label(config, group)}" for name, group in groups.items())
        return Reading(conflict=f"targeted differently: {found}", members=groups)
    return Reading(first, "" if first is not None else "neither targeted nor ignored")


def label(config: QuantConfig, group: int | None) -> str:
    """The name of a group, for messages."""
    return "no group" if group is None else config.groups[group].name


def _ignored(engine: Engine, module: str, config: QuantConfig, classes: tuple[str, ...]) -> str | None:
    """The entry of `ignore` that means a module."""
    if (entry := config.ignored_by(module)) is not None:
        return entry
    if engine.ignores_parts:
        parts = (entry for entry in config.ignore if not is_pattern(entry) and entry.lower() in module.lower())
        return next(parts, None)
    return next((name for name in classes if engine.ignores_classes and name in config.ignore), None)


def _target(config: QuantConfig, group: int, name: str) -> str:
    return next(target for target in config.groups[group].targets if means(target, name))
