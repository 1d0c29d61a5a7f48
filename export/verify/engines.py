"""What each engine makes of every layer: its config group, by `targets` and `ignore`.

Engines read the same config by different rules. The differences are data:

- vLLM and SGLang run q, k and v as one layer, `qkv_proj`. Targets are tried on that name first, then on its class, and
  only then on the members; so `re:.*up_proj` hits `gate_up_proj` and decides for the gate, too.
- Both ask about routed experts by the projections of the first one; what it gets, all get.
- In SGLang an entry of `ignore` counts where it is part of a name: `model.layers.0.mlp.gate`, a router, also means
  `model.layers.0.mlp.gate_proj`.
- transformers has every module as it is in the checkpoint, a head is a `Linear` to it as any other, and classes may
  stand in `ignore`.
- Our own runtime (`export.runtime`) asks about the members of a fused layer one by one, as its `matching` does.
- Older vLLM and SGLang raise where a layer is neither targeted nor ignored; others leave it unquantized.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from amaxbridge.export.runtime.group_of_module import LINEAR, Matching, fused_name
from amaxbridge.export.schemes.recipe import EVERY_LINEAR
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.stored_config import HEAD, Quantization, is_sound, means
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.fused_groups import groups_among
from amaxbridge.mappings.names import is_routed_expert

EXPERT = re.compile(r"(.*\.experts)\.\d+\..+")


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine reads targets and `ignore`.

    Args:
        fuses: runs fused groups as one layer, whose own name targets are tried on first.
        ignores_parts: an entry of `ignore` counts where it is contained in a name.
        ignores_classes: `Linear` in `ignore` means every linear module.
        head_is_linear: `Linear` targets the head.
        first_expert: asks about the first expert, for all; all its projections must be in one group.
        refuses_untargeted: raises for a layer that is neither targeted nor ignored.
    """

    name: str
    fuses: bool = True
    ignores_parts: bool = False
    ignores_classes: bool = False
    head_is_linear: bool = False
    first_expert: bool = False
    refuses_untargeted: bool = False


ENGINES = (
    Engine("vLLM", first_expert=True, refuses_untargeted=True),
    Engine("SGLang", ignores_parts=True, first_expert=True, refuses_untargeted=True),
    Engine("transformers", fuses=False, ignores_classes=True, head_is_linear=True),
)
RUNTIME = Engine("amaxbridge.export.runtime")


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as an engine has it: its name there, and the modules of the checkpoint that it is made of."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What an engine makes of a layer: a config group, or None and why; or a conflict that stops the load."""

    group: int | None = None
    why: str = ""
    conflict: str = ""


def read(engine: Engine, layer: Layer, config: Quantization) -> Reading:
    """What the engine makes of the layer."""
    ignored = {name: entry for name in layer.members if (entry := _ignored(engine, name, config)) is not None}
    if layer.name in config.ignore or len(ignored) == len(layer.members):
        return Reading(why=f"ignored by {next(iter(ignored.values()), layer.name)!r}")
    if ignored:
        spared = ", ".join(f"{name} by {entry!r}" for name, entry in ignored.items())
        return Reading(conflict=f"ignored in part: {spared}")
    if engine.fuses and len(layer.members) > 1 and (group := config.named_by(layer.name)) is not None:
        return Reading(group, f"{_target(config, group, layer.name)!r} hits {layer.name}")
    is_linear = engine.head_is_linear or not layer.name.endswith(HEAD)
    if engine.fuses and is_linear and len(layer.members) > 1 and (group := config.every_linear()) is not None:
        return Reading(group)
    groups = {name: config.named_by(name) for name in layer.members}
    if is_linear:
        groups = {name: config.every_linear() if group is None else group for name, group in groups.items()}
    first = next(iter(groups.values()))
    if len(set(groups.values())) > 1:
        found = ", ".join(f"{name}: {label(config, group)}" for name, group in groups.items())
        return Reading(conflict=f"targeted differently: {found}")
    return Reading(first, "" if first is not None else "neither targeted nor ignored")


def _ignored(engine: Engine, name: str, config: Quantization) -> str | None:
    """The entry of `ignore` that means a module."""
    if (entry := config.ignored_by(name)) is not None:
        return entry
    if engine.ignores_parts:
        return next(
            (entry for entry in config.ignore if not entry.startswith("re:") and entry.lower() in name.lower()), None
        )
    return EVERY_LINEAR if engine.ignores_classes and EVERY_LINEAR in config.ignore else None


def _target(config: Quantization, group: int, name: str) -> str:
    return next(target for target in config.groups[group].targets if means(target, name))


def label(config: Quantization, group: int | None) -> str:
    return "no group" if group is None else config.groups[group].name


def layers_of(view: CheckpointView, engine: Engine) -> Iterator[tuple[Layer, list[str]]]:
    """The layers that an engine asks about, each with the modules of the files that its answer is for."""
    experts: dict[str, list[str]] = {}
    others = []
    for name in view.modules:
        found = EXPERT.fullmatch(name) if engine.first_expert else None
        if found:
            experts.setdefault(found[1], []).append(name)
        else:
            others.append(name)
    if view.tied and engine.head_is_linear:
        others.append(HEAD)
    for members in _fused(others) if engine.fuses else [(name,) for name in others]:
        yield Layer(_fused_name(members), members), list(members)
    for layer, modules in experts.items():
        first = min(int(name[len(layer) + 1 :].partition(".")[0]) for name in modules)
        asked = [name for name in modules if name.startswith(f"{layer}.{first}.")]
        for name in asked:
            projection = name.removeprefix(f"{layer}.{first}")
            yield Layer(name, (name,)), [module for module in modules if module.endswith(projection)]


def _fused(modules: Sequence[str]) -> list[tuple[str, ...]]:
    """Fused groups; experts that are asked about one by one are not fused by name."""
    experts = dict.fromkeys(name for name in modules if is_routed_expert(f"{name}."))
    others = groups_among(name for name in modules if name not in experts)
    return [(name,) for name in experts] + [group.members for group in others]


def _fused_name(members: tuple[str, ...]) -> str:
    return fused_name(members[0]) if len(members) > 1 else members[0]


def readings(view: CheckpointView) -> list[tuple[Engine, Layer, Reading, list[str]]]:
    """What every engine makes of every layer, and the modules that it is for."""
    config = view.quantization
    if not config.raw:
        return []
    targets = tuple(
        tuple(filter(is_sound, group.targets)) for group in config.groups
    )  # others have a rule of their own
    matching = Matching(targets, tuple(filter(is_sound, config.ignore)))
    return [
        (
            engine,
            layer,
            _read_by_runtime(layer, matching) if engine is RUNTIME else read(engine, layer, config),
            modules,
        )
        for engine in (*ENGINES, RUNTIME)
        for layer, modules in layers_of(view, engine)
    ]


def _read_by_runtime(layer: Layer, matching: Matching) -> Reading:
    """Its own matching answers."""
    try:
        group = matching.group_of(layer.name, () if layer.name.endswith(HEAD) else LINEAR)
    except CheckpointError as error:
        return Reading(conflict=str(error))
    return Reading(group, "" if group is not None else "ignored, or targeted by no group")
