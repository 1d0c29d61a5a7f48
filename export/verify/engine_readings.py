"""Every layer of a checkpoint as each engine has it, and what the engine makes of it; see `architectures.engines`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from amaxbridge.export.architectures.engine_tables import GENERIC, Build, architectures_of
from amaxbridge.export.architectures.engines import (
    ENGINES,
    RUNTIME,
    Engine,
    Layer,
    Reading,
    as_named_by,
    read_layer,
)
from amaxbridge.export.architectures.facts import Architecture
from amaxbridge.export.architectures.modelopt_matchers import read_in_modelopt
from amaxbridge.export.quant_config import QuantConfig
from amaxbridge.export.schemes import MODELOPT_FORMAT
from amaxbridge.export.schemes.targets import HEAD, is_pattern
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.mappings.names import is_routed_expert

EVERY_ENGINE = (*ENGINES, RUNTIME)
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
_ROLES: Mapping[str, int] = MappingProxyType({"gate_proj": 0, "w1": 0, "down_proj": 1, "w2": 1, "up_proj": 2, "w3": 2})
"""Projections of an expert → their place in `Build.experts`."""


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """A layer of an engine.

    Args:
        path: where it lies in the engine's tree.
        layer: what the engine's matcher is asked.
        modules: the modules of the files that it is made of.
    """

    path: str
    layer: Layer
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineReading:
    """What an engine makes of one of its layers.

    Args:
        unquantized: True if the engine builds the layer in 16 bits whatever config.json says.
    """

    engine: Engine
    at: EngineLayer
    reading: Reading
    unquantized: bool


def build_of(view: CheckpointView, engine: Engine) -> Build | None:
    """What the engine makes of the architecture; None if it has no model class of its own for it."""
    return None if engine.facts is None else engine.facts.build_of(view.config)


def readings(view: CheckpointView) -> list[EngineReading]:
    """What every engine makes of every layer."""
    if not view.quantization.raw:
        return []
    found = list[EngineReading]()
    for engine in EVERY_ENGINE:
        build = build_of(view, engine) or GENERIC
        config = as_named_by(engine, build, view.quantization)
        found += [
            EngineReading(
                engine,
                at,
                _read(engine, at.layer, config),
                _in_16_bits(build, at.path) or _is_hidden(view, engine, at),
            )
            for at in layers_of(view, engine, build)
        ]
    return found


def _read(engine: Engine, layer: Layer, config: QuantConfig) -> Reading:
    found = read_in_modelopt(engine, layer, config) if config.method == MODELOPT_FORMAT else None
    return found or read_layer(engine, layer, config)


def _in_transformers(known: Architecture, module: str) -> str:
    """What transformers calls a module of the files."""
    prefix = next((each for each in known.towers if f"{module}.".startswith(each)), None)
    if prefix is not None and known.towers[prefix] and "*" not in known.towers[prefix][0]:
        return (known.towers[prefix][0] + module[len(prefix) :]).removesuffix(".")
    others = [name for name in known.other_names([module]) if not is_pattern(name)]
    return others[0] if others else module


def _in_16_bits(build: Build, path: str) -> bool:
    """True if a layer, or the fused layer that it would be part of, is built without quantization."""
    return build.builds_unquantized(path) or build.builds_unquantized(build.fused(path))


def _is_hidden(view: CheckpointView, engine: Engine, at: EngineLayer) -> bool:
    """True for a layer in 16 bits whatever config.json says, which the engine's table does not have."""
    known = view.known_architecture
    if engine.bare_routers and known is not None:
        facts = [known.fact(f"{module}.weight") for module in at.modules]
        if any(fact is not None and fact.bare for fact in facts):
            return True
    patterns = [each for name in architectures_of(view.config) if (each := engine.unquantized.get(name)) is not None]
    in_compressed_tensors = view.quantization.method != MODELOPT_FORMAT
    return in_compressed_tensors and any(re.fullmatch(pattern, at.path) for pattern in patterns)


def layers_of(view: CheckpointView, engine: Engine, build: Build) -> Iterator[EngineLayer]:
    """The layers that an engine asks about, each with the modules of the files that its answer is for."""
    experts: dict[str, list[str]] = {}
    layers: dict[str, list[str]] = {}
    known = None if engine.fuses else view.known_architecture
    for name in view.modules:
        path = build.path_of(name) if known is None else _in_transformers(known, name)
        if engine.asks_first_expert and (found := EXPERT.fullmatch(path)):
            experts.setdefault(found[1], []).append(name)
        elif engine.fuses and not is_routed_expert(f"{name}."):
            layers.setdefault(build.fused(path), []).append(name)
        else:
            layers[path] = [name]
    tied = HEAD if view.tied else None
    if known is not None:  # the class's default decides where config.json is silent, and heads have other names
        tied = next(iter(known.heads_without_tensor(view.tensors)), None) if known.tied else None
    if tied is not None and engine.head_is_linear:
        layers[tied] = [tied]
    for path, modules in layers.items():
        # a member alone is no fused layer: queries that are projected at once, a tower's `fc1`
        own = build.path_of(modules[0]) if engine.fuses and len(modules) == 1 else path
        asked = build.asked(own)
        members = build.members_of(asked) if engine.fuses else (asked,)
        yield EngineLayer(own, Layer(asked, members), tuple(modules))
    for path, modules in experts.items():
        if view.quantization.method == MODELOPT_FORMAT:  # asked for as one
            yield EngineLayer(path, Layer(path, (path,)), tuple(modules))
        else:
            yield from _expert_layers(path, modules, engine, build)


def _expert_layers(path: str, modules: list[str], engine: Engine, build: Build) -> Iterator[EngineLayer]:
    """The projections of the first expert, each with the same projection of all experts."""
    projections: dict[str, list[str]] = {}
    for name in modules:
        projections.setdefault(name.rpartition(".")[2], []).append(name)
    for projection, names in projections.items():
        role = _ROLES.get(projection)
        leaf = build.path_of(names[0]).rpartition(".")[2]
        if role is not None:
            leaf = (engine.expert_names or build.experts)[role]
        asked = f"{path}.0.{leaf}"
        yield EngineLayer(path, Layer(asked, (asked,)), tuple(names))
