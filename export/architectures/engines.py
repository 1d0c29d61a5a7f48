"""What each engine makes of a layer: its config group, by `targets` and `ignore`.

Engines read one config by different rules. The differences are the fields of `Engine`; what an engine knows of an
architecture is in its table (`engine_tables`). Adding an engine: an entry here, and a table.

An engine runs q, k and v as one layer, `qkv_proj`, which no checkpoint names. vLLM and SGLang ask about such a layer by
its own name first; of what they ask about its members, they know the members only where their model class says so.
tests/golden/engine_matchers.json holds the answers of the engines' own matchers, which a test compares with ours.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from amaxbridge.export.architectures.engine_tables import GENERIC, Build, EngineTable, table_of
from amaxbridge.export.quant_config import QuantConfig
from amaxbridge.export.schemes.targets import EVERY_LINEAR, HEAD, is_pattern, means
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.names import is_routed_expert

LINEAR = (EVERY_LINEAR,)
_PRIMARY_OF: Mapping[str, str] = MappingProxyType({name: members[0] for name, members in GENERIC.packed.items()})
"""What engines call a fused layer → its first member. The members are those of `mappings.fused_groups`."""
_OF_SGLANG: Mapping[str, str] = MappingProxyType({"fused_qkv_a_proj_with_mqa": "q_a_proj"})
"""Another name, which SGLang alone gives a layer."""


class Step(StrEnum):
    """A place where an engine looks for a target."""

    NAME = "name"  # the layer's own
    MEMBERS = "members"  # all of them must be targeted; the first one's target decides
    CLASS = "class"


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """How an engine reads targets and `ignore`.

    Args:
        key: the name that users choose.
        name: the name in reports.
        table: name of its table; "" for one that shares no knowledge of architectures.
        steps: where it looks for a target, in this order; () for an engine that does not fuse.
        fuses: runs fused groups as one layer.
        patterns_ignore_fused: a pattern in `ignore` that hits the fused layer's own name ignores it; else only a
            literal entry does.
        reads_suffixes: an entry of `ignore`, or a target of the head, counts if a name ends in it, after a dot.
        ignores_classes: `Linear` in `ignore` means every linear module.
        renames_everything: renames patterns and classes, too; else only entries that are names with a dot.
        alphabetical: of several targets that name a layer, the first by the alphabet decides, names before patterns;
            else the first in config.json.
        head_is_linear: `Linear` targets the head.
        asks_first_expert: what the projections of the first expert get, all experts get.
        expert_names: names of gate, down and up under which it asks for the first expert, whatever the files call them;
            () for those of its table.
        refuses_untargeted: raises for a layer that is neither targeted nor ignored; older vLLM too.
        cuts: serves under tensor and expert parallelism, and needs shards that suit its kernels.
        cuts_wildcards: renames `experts*` of ModelOpt's configs as `experts` and `experts.*`.
        mixed_needs: algorithms of ModelOpt of which it needs one to know MIXED_PRECISION; () if it needs none.
        caches: the formats of key-value caches whose scales it reads, as `cache_scales` names them.
        heads: classifiers that it has a class for → what is wrong with their heads there, "" if nothing is; None if it
            makes any language model a classifier.
        unquantized: architecture → pattern of layers that it builds in 16 bits from compressed-tensors, which its table
            does not have: a condition on the format decides, or a router is a bare parameter.
        bare_routers: routers that are bare parameters in transformers are so here.
        unread_experts: architectures whose experts it reads in one packed tensor only → what becomes of single ones.
        misplaces_single_groups: gives gate and up of 4-bit integer experts the scales of other rows where a rank has
            as many of their outputs as a group has columns; says in which releases.
    """

    key: str
    name: str
    table: str = ""
    steps: tuple[Step, ...] = ()
    fuses: bool = True
    patterns_ignore_fused: bool = False
    reads_suffixes: bool = False
    ignores_classes: bool = False
    renames_everything: bool = False
    alphabetical: bool = False
    head_is_linear: bool = False
    asks_first_expert: bool = False
    expert_names: tuple[str, ...] = ()
    refuses_untargeted: bool = False
    cuts: bool = False
    cuts_wildcards: bool = False
    mixed_needs: tuple[str, ...] = ()
    caches: tuple[str, ...] = ("fp8",)
    heads: Mapping[str, str] | None = None
    unquantized: Mapping[str, str] = field(default_factory=dict)
    bare_routers: bool = False
    unread_experts: Mapping[str, str] = field(default_factory=dict)
    misplaces_single_groups: str = ""

    def leaves_out(self, architecture: str, projection: str) -> str | None:
        """What becomes of a projection of a single expert that the engine does not load; None if it loads it."""
        if architecture in self.unread_experts:
            return self.unread_experts[architecture]
        merges = self.facts.merges if self.facts else {}
        return "reinitialises it" if projection not in merges.get(architecture, (projection,)) else None

    @property
    def facts(self) -> EngineTable | None:
        """The engine's table; None for our runtime, whose schemes are those of this package."""
        return table_of(self.table) if self.table else None

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name} {self.facts.version}" if self.facts else self.name


_TOWER_OF_KIMI = r"(vision_tower|mm_projector)\..*"
_ROUTERS_OF_SGLANG = (
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "Ernie4_5_MoeForCausalLM",
    "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM",
)  # fmt: skip
_RANDOM_BIAS = "adds a bias to its head, which no file has and which stays random"
VLLM = Engine(
    "vllm", "vLLM", "vllm", (Step.NAME, Step.MEMBERS, Step.CLASS), patterns_ignore_fused=True, asks_first_expert=True,
    cuts=True, cuts_wildcards=True, caches=("fp8", "fp8 per head", "nvfp4"),
    unquantized=MappingProxyType({"KimiK25ForConditionalGeneration": _TOWER_OF_KIMI}),
    unread_experts=MappingProxyType(dict.fromkeys(("GptOssForCausalLM", "GraniteMoeForCausalLM"), "stops at its name")),
    misplaces_single_groups="0.26 to 0.33",
)  # fmt: skip
SGLANG = Engine(
    "sglang", "SGLang", "sglang", (Step.NAME, Step.CLASS, Step.MEMBERS), reads_suffixes=True, renames_everything=True,
    asks_first_expert=True, expert_names=("gate_proj", "down_proj", "up_proj"), refuses_untargeted=True, cuts=True,
    mixed_needs=("NVFP4", "W4A16_NVFP4"), heads=MappingProxyType({
        "LlamaForSequenceClassification": "", "Gemma2ForSequenceClassification": "",
        "Qwen2ForSequenceClassification": _RANDOM_BIAS, "Qwen3ForSequenceClassification": _RANDOM_BIAS,
    }), unquantized=MappingProxyType({
        **dict.fromkeys(_ROUTERS_OF_SGLANG, r"model\.layers\.\d+\.mlp\.gate"),
        "KimiK25ForConditionalGeneration": rf"{_TOWER_OF_KIMI}|language_model\.model\.layers\.\d+\.mlp\.gate",
    }), unread_experts=MappingProxyType({"GptOssForCausalLM": "skips it"}),
)  # fmt: skip
TRANSFORMERS = Engine(
    "transformers", "transformers", "transformers", fuses=False, ignores_classes=True, alphabetical=True,
    head_is_linear=True, bare_routers=True, caches=("fp8", "fp8 per head"),
)  # fmt: skip
RUNTIME = Engine("runtime", "amaxbridge.export.runtime", ignores_classes=True, head_is_linear=True, bare_routers=True)
"""Our own, which loads models of transformers."""
ENGINES = (VLLM, SGLANG, TRANSFORMERS)
"""The engines that serve checkpoints."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as an engine has it: its name there, and the members of it that the engine's matcher knows."""

    name: str
    members: tuple[str, ...]

    @classmethod
    def named(cls, name: str) -> "Layer":
        """The layer of an engine, fused or not, under the usual names."""
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


def fused_layer_names(module: str) -> tuple[str, ...]:
    """What engines call the layer whose first member is this module, without its parent; () for any other module.

    Engines ask for experts one by one.
    """
    primary = module.rpartition(".")[2]
    if is_routed_expert(module):
        return ()
    return tuple(name for name, first in (*_PRIMARY_OF.items(), *_OF_SGLANG.items()) if first == primary)


def ungated_names(module: str, modules: Container[str]) -> tuple[str, ...]:
    """What engines call the gate of an expert that has none, if this module is its up projection; else ().

    They ask for three projections of every first expert: SGLang for `gate_proj`, vLLM for `None`, Python's own word.
    """
    parent, _, projection = module.rpartition(".")
    ungated = is_routed_expert(module) and projection == "up_proj" and f"{parent}.gate_proj" not in modules
    return ("gate_proj", "None") if ungated else ()


def renamed_by_engines(architecture: str, module: str) -> tuple[str, ...]:
    """What engines call a module of the files, where that is something else: `model.layers.0…` for `backbone.…`.

    They rename names in `targets`, but no patterns.
    """
    builds = (engine.facts.builds.get(architecture) for engine in ENGINES if engine.facts is not None)
    names = dict.fromkeys(build.path_of(module) for build in builds if build is not None and build.renames)
    return tuple(name for name in names if name != module)


def as_named_by(engine: Engine, build: Build, config: QuantConfig) -> QuantConfig:
    """The config with the names of targets and `ignore` as an engine renames them for an architecture."""
    if not build.renames:
        return config

    def renamed(entry: str) -> str:
        is_name = "." in entry and not is_pattern(entry)
        return build.renamed(entry) if is_name or engine.renames_everything else entry

    groups = tuple(replace(group, targets=tuple(map(renamed, group.targets))) for group in config.groups)
    ignore = tuple(map(renamed, config.ignore))
    return replace(config, ignore=ignore, excluded=tuple(_renamed_wildcards(engine, build, config)), groups=groups)


def _renamed_wildcards(engine: Engine, build: Build, config: QuantConfig) -> Iterator[str]:
    """ModelOpt's entries under an engine's names. vLLM cuts a wildcard into two, whose names its renames find."""
    for entry in config.excluded:
        cut = engine.cuts_wildcards and len(entry) > 1 and entry.endswith("*") and not entry.endswith(".*")
        yield from map(build.renamed, (entry[:-1], f"{entry[:-1]}.*") if cut else (entry,))


def read_layer(engine: Engine, layer: Layer, config: QuantConfig, classes: tuple[str, ...] = LINEAR) -> Reading:
    """What the engine makes of the layer.

    Args:
        classes: what targets may call the layer's class. `Linear` does not mean the head, except in engines to which
            it is a linear layer as any other.
    """
    if layer.name.endswith(HEAD) and not engine.head_is_linear:
        classes = tuple(name for name in classes if name != EVERY_LINEAR)
    ignored = {each: entry for each in layer.members if (entry := _ignored(engine, each, config, classes)) is not None}
    if (entry := _ignores_whole(engine, layer, config)) is not None or len(ignored) == len(layer.members):
        return Reading(why=f"ignored by {entry or next(iter(ignored.values()))!r}")
    by_class = config.of_class(classes)
    if engine.steps and not ignored:
        return _by_steps(engine, layer, config, by_class)
    named = {member: _named_by(engine, config, member) for member in layer.members}
    groups = {member: by_class if group is None else group for member, group in named.items()}
    groups |= dict.fromkeys(ignored)
    if ignored:
        spared = ", ".join(f"{name} by {entry!r}" for name, entry in ignored.items())
        return Reading(conflict=f"ignored in part: {spared}", members=groups)
    first = next(iter(groups.values()))
    if len(set(groups.values())) > 1:
        found = ", ".join(f"{name}: {label(config, group)}" for name, group in groups.items())
        return Reading(conflict=f"targeted differently: {found}", members=groups)
    return Reading(first, "" if first is not None else _NEITHER)


_NEITHER = "neither targeted nor ignored"


def _by_steps(engine: Engine, layer: Layer, config: QuantConfig, by_class: int | None) -> Reading:
    is_fused = layer.members != (layer.name,)
    if engine.reads_suffixes and layer.name.endswith(HEAD):
        return _by_suffix(layer, config)
    for step in engine.steps:
        if step is Step.NAME and (group := config.named_by(layer.name)) is not None:
            why = f"{_target(config, group, layer.name)!r} hits {layer.name}" if is_fused else ""
            return Reading(group, why)
        if step is Step.CLASS and by_class is not None:
            return Reading(by_class)
        if step is Step.MEMBERS and is_fused:
            groups = [config.named_by(member) for member in layer.members]
            if None not in groups:
                return Reading(groups[0], f"as {layer.members[0]}")
    return Reading(why=_NEITHER)


def _by_suffix(layer: Layer, config: QuantConfig) -> Reading:
    for number, group in enumerate(config.groups):
        if any(means(target, layer.name) or layer.name.endswith(f".{target}") for target in group.targets):
            return Reading(number)
    return Reading(why=_NEITHER)


def label(config: QuantConfig, group: int | None) -> str:
    """The name of a group, for messages."""
    return "no group" if group is None else config.groups[group].name


def _named_by(engine: Engine, config: QuantConfig, module: str) -> int | None:
    """The group that targets a module by its name."""
    if not engine.alphabetical:
        return config.named_by(module)
    hits = [
        (is_pattern(target), target, number)
        for number, group in enumerate(config.groups)
        for target in group.targets
        if means(target, module)
    ]
    return min(hits)[2] if hits else None


def _ignores_whole(engine: Engine, layer: Layer, config: QuantConfig) -> str | None:
    """The entry of `ignore` that means a fused layer by its own name."""
    if engine.patterns_ignore_fused:
        return config.ignored_by(layer.name)
    return layer.name if layer.name in config.ignore else None


def _ignored(engine: Engine, module: str, config: QuantConfig, classes: tuple[str, ...]) -> str | None:
    """The entry of `ignore` that means a module."""
    if (entry := config.ignored_by(module)) is not None:
        return entry
    if engine.reads_suffixes:
        suffixes = (entry for entry in config.ignore if not is_pattern(entry) and module.endswith(f".{entry}"))
        return next(suffixes, None)
    return next((name for name in classes if engine.ignores_classes and name in config.ignore), None)


def _target(config: QuantConfig, group: int, name: str) -> str:
    return next(target for target in config.groups[group].targets if means(target, name))
