"""What each engine serves, builds unquantized, fuses and renames: tables read from its source, one JSON file each.

`make engines` reads the engines' sources and fails where a table differs from them; tests/engines/README.md tells how.
A file is read when it is first asked for, in milliseconds. `modelopt.json` has the `schemes` in ModelOpt's format, of
all engines, read by hand from vLLM 0.33.0, SGLang 0.5.23 and transformers 5.24.0.

    schemes        scheme → what serves `linear` layers, routed `experts` and the `head`: a class of the engine, or `!`
                   and the words with which it refuses; a head without an entry is a linear layer
    architectures  name in config.json → number of its build; null: the engine runs transformers' model
    merges         architecture whose experts the engine packs → the projections that it takes of single ones; absent:
                   it takes all
    builds         renames      what becomes of names of modules, step by step: [`prefix`, from, to]
                   packed       fused projection → members, as far as the engine's matcher of `ignore` knows them
                   fuses        path of a fused layer → its members, as the engine builds it
                   unquantized  paths of linear layers that it builds in 16 bits whatever config.json says
                   asks         path → the name by which it looks a layer up in config.json
                   experts      names of an expert's gate, down and up projection; absent: gate_proj, down_proj, up_proj
                   head         true if it can build lm_head quantized; `embedding` likewise
                   hosts        prefixes of language models that are of an architecture of their own
                   unread       tables that its source computes, so that names here are incomplete
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from amaxbridge.mappings.families import language_model_of
from amaxbridge.mappings.fused_groups import FUSED_PROJECTIONS

_EXPERTS = ("gate_proj", "down_proj", "up_proj")
_STEPS = ("regex", "substr", "prefix", "suffix")
_REFUSED = "!"


@dataclass(frozen=True)
class Build:
    """What an engine makes of an architecture; the fields are those of `builds`, above.

    Args:
        first_only: of the renames of a step, only the longest that applies is made; else all, in order.
    """

    renames: tuple[tuple[str, str, str], ...] = ()
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fuses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unquantized: tuple[str, ...] = ()
    asks: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = _EXPERTS
    head: bool = True
    embedding: bool = True
    hosts: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    first_only: bool = False

    def renamed(self, name: str) -> str:
        """A name of the files, or an entry of `ignore` or `targets`, as the engine has it."""
        for step in _STEPS:
            rules = [(one, other) for kind, one, other in self.renames if kind == step]
            if self.first_only:
                rules.sort(key=lambda rule: len(rule[0]), reverse=True)
            for one, other in rules:
                found = _rename(step, one, other, name)
                if found is not None:
                    name = found
                    if self.first_only:
                        break
        return name

    def path_of(self, module: str) -> str:
        """The path of a module of the files in the engine's tree, before it is fused."""
        return self.renamed(f"{module}.weight").removesuffix(".weight")

    def fused(self, path: str) -> str:
        """The path of the layer that a module is part of; its own if it is fused with no other."""
        parent, dot, leaf = path.rpartition(".")
        for pattern, whole, members in self._fuses:
            if leaf in members and (pattern is None or pattern.fullmatch(parent)):
                return parent + dot + whole
        return path

    def members_of(self, layer: str) -> tuple[str, ...]:
        """The members of a fused layer that the engine's matcher knows; itself if it knows none."""
        parent, dot, leaf = layer.rpartition(".")
        return tuple(parent + dot + member for member in self.packed.get(leaf, (leaf,)))

    def asked(self, layer: str) -> str:
        """The name by which the engine looks a layer up in config.json."""
        for pattern, name in self._asks:
            if (found := pattern.fullmatch(layer)) is not None:
                parts = name.split("*")
                return parts[0] + "".join(map("".join, zip(found.groups(), parts[1:], strict=True)))
        return layer

    def builds_unquantized(self, layer: str) -> bool:
        """True if the engine builds a layer in 16 bits whatever config.json says."""
        return self._unquantized.fullmatch(layer) is not None

    @cached_property
    def _unquantized(self) -> re.Pattern[str]:
        return re.compile("|".join(map(_pattern, self.unquantized)) or r"(?!)")

    @cached_property
    def _fuses(self) -> list[tuple[re.Pattern[str] | None, str, tuple[str, ...]]]:
        """Pattern of the parent, None for any; name of the fused layer; members."""
        found = ((*path.rpartition("."), members) for path, members in self.fuses.items())
        return [
            (re.compile(_pattern(parent)) if dot else None, whole, members) for parent, dot, whole, members in found
        ]

    @cached_property
    def _asks(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(_pattern(path, groups=True)), name) for path, name in self.asks.items()]

    def hosting(self, prefix: str, inner: "Build") -> "Build":
        """With the language model of another architecture below a prefix."""
        return replace(
            self,
            renames=(*self.renames, *inner.renames),
            packed={**self.packed, **inner.packed},
            fuses={**self.fuses, **{f"{prefix}.{path}": members for path, members in inner.fuses.items()}},
            unquantized=(*self.unquantized, *(f"{prefix}.{path}" for path in inner.unquantized)),
            asks={**self.asks, **{f"{prefix}.{path}": f"{prefix}.{name}" for path, name in inner.asks.items()}},
            experts=inner.experts,
            head=inner.head,
            embedding=inner.embedding,
        )


GENERIC = Build(
    packed={
        "qkv_proj": FUSED_PROJECTIONS[0], "gate_up_proj": FUSED_PROJECTIONS[1], "w13": FUSED_PROJECTIONS[2],
        "fused_qkv_a_proj": FUSED_PROJECTIONS[3], "in_proj_qkvz": FUSED_PROJECTIONS[4],
        "in_proj_ba": FUSED_PROJECTIONS[5],
    },
)  # fmt: skip
"""What engines make of an architecture that is not in the table: the names of the files, the usual fused groups."""
GENERIC = replace(GENERIC, fuses=GENERIC.packed)


@dataclass(frozen=True)
class EngineTable:
    """The table of an engine.

    Args:
        version: the version that it was read from.
        compressed_tensors: the version of compressed-tensors that this version pins, or was tried with.
        schemes: scheme → `linear` or `experts` → a class of the engine, or `!` and its words.
        builds: architecture → build; None for one that the engine runs as transformers' model.
        language_models: `model_type` → architecture of its language model.
        merges: architecture whose experts the engine packs → the projections that it takes of single ones.
    """

    version: str
    compressed_tensors: str
    schemes: Mapping[str, Mapping[str, str]]
    builds: Mapping[str, Build | None] = field(default_factory=dict)
    language_models: Mapping[str, str] = field(default_factory=dict)
    merges: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def refusal(self, scheme: str, part: str) -> str | None:
        """Why the engine does not serve a scheme for `linear` layers, `experts` or the `head`; None if it does."""
        parts = self.schemes.get(scheme, {})
        said = parts.get(part) or parts.get("linear", "!it is not in the table")
        return said.removeprefix(_REFUSED) if said.startswith(_REFUSED) else None

    def build_of(self, config: Mapping[str, Any]) -> Build | None:
        """The build of a model by its config.json; None if the engine has no model class of its own for it.

        A classifier is built as its language model, but for the head.
        """
        build = next((found for name in _names(config) if (found := self.builds.get(name))), None)
        text = config.get("text_config")
        if build is None or not build.hosts or not isinstance(text, dict):
            return build
        named = (*_names(text), self.language_models.get(str(text.get("model_type")), ""))
        inner = next((found for name in named if (found := self.builds.get(name))), None)
        return build if inner is None else build.hosting(build.hosts[0], inner)


@cache
def table_of(engine: str) -> EngineTable:
    """The table of `vllm`, `sglang` or `transformers`."""
    here = files("amaxbridge.export.architectures")
    raw = json.loads((here / f"{engine}.json").read_text())
    in_modelopt = json.loads((here / "modelopt.json").read_text())[engine]
    numbered = [_build(each, first_only=engine == "sglang") for each in raw.get("builds", ())]
    builds = {name: None if at is None else numbered[at] for name, at in raw.get("architectures", {}).items()}
    return EngineTable(
        raw["version"],
        raw["compressed_tensors"],
        {**raw["schemes"], **{f"modelopt {scheme}": parts for scheme, parts in in_modelopt.items()}},
        builds,
        raw.get("language_models", {}),
        raw.get("merges", {}),
    )


def _build(raw: Mapping[str, Any], *, first_only: bool) -> Build:
    def listed(name: str) -> tuple[str, ...]:
        return tuple(raw.get(name, ()))

    def members(name: str) -> dict[str, tuple[str, ...]]:
        return {key: tuple(each) for key, each in raw.get(name, {}).items()}

    return Build(
        renames=tuple((step, one, other) for step, one, other in raw.get("renames", ())),
        packed=members("packed"),
        fuses=members("fuses"),
        unquantized=listed("unquantized"),
        asks=raw.get("asks", {}),
        experts=listed("experts") or _EXPERTS,
        head=raw["head"],
        embedding=raw["embedding"],
        hosts=listed("hosts"),
        unread=listed("unread"),
        first_only=first_only,
    )


def architectures_of(config: Mapping[str, Any]) -> list[str]:
    """The architectures that a config.json names, as far as they are names."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _names(config: Mapping[str, Any]) -> Iterable[str]:
    """The same, and the language models that classifiers were made of."""
    names = architectures_of(config)
    return [*names, *(model for name in names if (model := language_model_of(name)) is not None)]


def _rename(step: str, one: str, other: str, name: str) -> str | None:
    if step == "regex":
        return re.sub(one, other, name) if re.search(one, name) else None
    if step == "substr":
        return name.replace(one, other, 1) if one in name else None
    if step == "prefix":
        return other + name[len(one) :] if name.startswith(one) else None
    return name[: len(name) - len(one)] + other if name.endswith(one) else None


def _pattern(path: str, *, groups: bool = False) -> str:
    number = r"([^.]+)" if groups else r"[^.]+"
    return number.join(map(re.escape, path.split("*")))
