"""Every layer of a checkpoint as each engine has it, and what the engine makes of it; see `architectures.engines`."""

import re
from collections.abc import Iterator, Sequence

from amaxbridge.export.architectures.engines import ENGINES, RUNTIME, Engine, Layer, Reading, fused_name, read_layer
from amaxbridge.export.schemes.targets import HEAD
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.mappings.fused_groups import groups_among
from amaxbridge.mappings.names import is_routed_expert

EXPERT = re.compile(r"(.*\.experts)\.\d+\..+")


def readings(view: CheckpointView) -> list[tuple[Engine, Layer, Reading, list[str]]]:
    """What every engine makes of every layer, and the modules that it is for."""
    config = view.quantization
    if not config.raw:
        return []
    return [
        (engine, layer, read_layer(engine, layer, config), modules)
        for engine in (*ENGINES, RUNTIME)
        for layer, modules in layers_of(view, engine)
    ]


def layers_of(view: CheckpointView, engine: Engine) -> Iterator[tuple[Layer, list[str]]]:
    """The layers that an engine asks about, each with the modules of the files that its answer is for."""
    experts: dict[str, list[str]] = {}
    others = []
    for name in view.modules:
        found = EXPERT.fullmatch(name) if engine.asks_first_expert else None
        if found:
            experts.setdefault(found[1], []).append(name)
        else:
            others.append(name)
    if view.tied and engine.head_is_linear:
        others.append(HEAD)
    for members in _fused(others) if engine.fuses else [(name,) for name in others]:
        yield Layer(fused_name(members[0]) if len(members) > 1 else members[0], members), list(members)
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
