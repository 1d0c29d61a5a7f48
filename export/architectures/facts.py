"""What is known of a Hugging Face architecture's tensors: the role, the axes and the sizes of each.

One file for each architecture of transformers lies in `known/`, made from transformers' own models by `make
architectures` (`tests/architectures/`). Its keys are patterns of tensor names, `*` for a number, in every spelling that
files have: as transformers names its modules, and as it saves them.

Not every tensor of a file is in its architecture's table. Layers for multi-token prediction behind the last layer,
buffers that old files keep, and what transformers itself leaves unread are known by rule.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

from amaxbridge.export.disk.packed_experts import PackedSource, sources_in
from amaxbridge.export.schemes.recipe import is_left_alone
from amaxbridge.export.schemes.targets import EMBEDDINGS
from amaxbridge.mappings.errors import MappingError, listing
from amaxbridge.mappings.families import language_model_of, relative_of
from amaxbridge.mappings.families.classifiers import SCORE
from amaxbridge.mappings.family import PackedExperts
from amaxbridge.mappings.names import module_of

KNOWN = Path(__file__).parent / "known"
"""The table: a file for each architecture."""

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
_NUMBER_OR_STAR = re.compile(rf"{_NUMBER.pattern}|\*")
_STAR = re.compile(r"(\*(?:/2)?)")
_BUFFERS = re.compile(r".*(\.|^)(inv_freq|masked_bias|position_ids|num_batches_tracked|attn\.bias|attention\.bias)")
"""Buffers that older files hold and no model reads."""
_MTP_LAYER = re.compile(r"\bmtp_layers\.\d")
_LAYER = re.compile(r".*?\.?layers\.(\d+)\.")


class Role(StrEnum):
    """What a tensor is to an engine. All but `LINEAR` and `EXPERTS` stay unquantized unless a target names them."""

    LINEAR = "linear"
    EXPERTS = "experts"
    INPUTS_FIRST = "inputs_first"
    OPAQUE = "opaque"
    HEAD = "head"
    EMBEDDING = "embedding"
    ROUTER = "router"
    INDEXER = "indexer"
    TOWER = "tower"
    RECURRENT = "recurrent"
    CONVOLUTION = "convolution"
    PARAMETER = "parameter"
    VECTOR = "vector"
    MTP = "mtp"
    BUFFER = "buffer"


MEANINGS: Mapping[Role, str] = {
    Role.INPUTS_FIRST: "a weight stored as [in, out], for which engines have no quantized layers",
    Role.OPAQUE: "experts in a layout that is not taken apart",
}
"""Why a weight cannot be quantized."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of the tensors of one pattern.

    Args:
        shape: an expression in the fields of config.json for each dim, None where there is none; in the files' order
            of axes, with outputs first where files have either order.
        module: the tensor's pattern as transformers names its modules.
        holds: projections that a tensor of packed experts holds.
        inputs_first: packed experts with inputs before outputs; None if files have either, and sizes decide.
        interleaved: gate and up rows alternate.
        bare: a router that is a parameter in transformers, and no linear layer.
        numbers: how many experts the files of a layer number here, where it is not how many the model routes to: those
            of two kinds in one row, or more than are used.
    """

    role: Role
    module: str
    shape: tuple[str | None, ...] | None = None
    holds: tuple[str, ...] = ()
    inputs_first: bool | None = False
    interleaved: bool = False
    bare: bool = False
    numbers: str | None = None


class Knowledge(Protocol):
    """What is known, or guessed, of the tensors of a model."""

    def stays_unquantized(self, module: str) -> bool:
        """True if `Linear` does not target a module without calibration; only its own name does."""

    def experts_in(self, name: str, shape: tuple[int, ...]) -> Mapping[str, PackedSource]:
        """The single experts in a tensor: name → where it lies; empty if the tensor packs no experts."""

    def other_names(self, modules: Iterable[str]) -> Sequence[str]:
        """What transformers calls these modules where it is not what the files call them."""

    def is_embedding(self, module: str) -> bool:
        """True if the module looks rows of its weight up, and is no linear layer to any engine."""

    def layout_of(self, name: str) -> PackedExperts:
        """How a tensor packs experts."""

    def with_axes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The same for files with tensors of these shapes."""

    def packs_experts(self, name: str, shape: tuple[int, ...]) -> bool:
        """True if the tensor holds several experts, in whatever layout."""

    def heads_without_tensor(self, names: Iterable[str]) -> Sequence[str]:
        """The output layers whose weight is none of these tensors: they are tied to the embeddings."""

    def linears_without_suffix(self, names: Iterable[str]) -> Sequence[str]:
        """Weights of linear modules that the files do not call `.weight`, with their modules' names in transformers."""


@dataclass(frozen=True, slots=True)
class Guess:
    """An architecture that is not known, read by the names that most models use."""

    tied_head: str | None = None

    def stays_unquantized(self, module: str) -> bool:
        return is_left_alone(module)

    def layout_of(self, name: str) -> PackedExperts:
        return PackedExperts()

    def experts_in(self, name: str, shape: tuple[int, ...]) -> Mapping[str, PackedSource]:
        return sources_in(name, shape, self.layout_of(name))

    def with_axes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        return self

    def packs_experts(self, name: str, shape: tuple[int, ...]) -> bool:
        return bool(self.experts_in(name, shape))

    def other_names(self, modules: Iterable[str]) -> Sequence[str]:
        return ()

    def is_embedding(self, module: str) -> bool:
        return module.endswith(EMBEDDINGS)

    def heads_without_tensor(self, names: Iterable[str]) -> Sequence[str]:
        return [self.tied_head] if self.tied_head and f"{self.tied_head}.weight" not in names else []

    def linears_without_suffix(self, names: Iterable[str]) -> Sequence[str]:
        return ()


GUESS = Guess()


@dataclass(frozen=True, slots=True)
class Architecture:
    """An entry of `architectures` in config.json, and the configuration of one model of it.

    Args:
        sizes: the fields of the language model's configuration.
        base: prefix that names may have or lack, as `model` or `transformer`.
        facts: pattern of a tensor's name → what is known of it.
        towers: prefix of names of models beside the language model → the prefixes that transformers gives their
            modules, none if it names all as the files do.
        heads: the modules of output layers, the model's own before those of models inside it.
        tied: the model's own is the embedding, unless the file has a tensor of its own for it.
        unread: what transformers leaves unread in files.
        twins: prefix of modules → the prefix of modules in another place of transformers' model with the same weights.
        inputs_first: the order of axes in the files of this model, where files of the architecture have either.
    """

    name: str
    sizes: Mapping[str, Any]
    base: str
    facts: Mapping[str, Fact]
    towers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    tied: bool = False
    unread: tuple[re.Pattern[str], ...] = ()
    twins: Mapping[str, str] = field(default_factory=dict)
    inputs_first: bool = False

    def fact(self, name: str) -> Fact | None:
        """What is known of a tensor; None if nothing is."""
        pattern = pattern_of(name)
        for spelled in (pattern, f"{self.base}.{pattern}", pattern.removeprefix(f"{self.base}.")):
            if (found := self.facts.get(spelled)) is not None:
                return found
        for prefix in self.towers:
            if pattern.startswith(prefix):
                return Fact(Role.TOWER, pattern)
        if pattern.endswith(".bias") and (weight := self.fact(name.removesuffix("bias") + "weight")) is not None:
            return Fact(weight.role if weight.role is Role.HEAD else Role.VECTOR, pattern)
        if _BUFFERS.fullmatch(name):
            return Fact(Role.BUFFER, pattern)
        if any(each.search(name) for each in self.unread) or self._is_behind_the_last_layer(name):
            return Fact(Role.MTP, pattern)
        return None

    def _is_behind_the_last_layer(self, name: str) -> bool:
        if _MTP_LAYER.search(name):
            return True
        layer, layers = _LAYER.match(name), self.sizes.get("num_hidden_layers")
        return layer is not None and isinstance(layers, int) and int(layer[1]) >= layers

    def stays_unquantized(self, module: str) -> bool:
        """True if `Linear` does not target a module without calibration; only its own name does."""
        found = self.fact(f"{module}.weight")
        return found is not None and found.role not in (Role.LINEAR, Role.EXPERTS, *MEANINGS)

    def with_axes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The architecture of these files, where files hold experts in either order of axes.

        A tensor of equal sides does not tell; another of the same files does.

        Raises:
            MappingError: the files do not tell, or not the same.
        """
        found: dict[bool, list[str]] = {False: [], True: []}
        either = []
        for name, shape in shapes.items():
            fact = self.fact(name)
            if fact is None or fact.role is not Role.EXPERTS or fact.inputs_first is not None:
                continue
            either.append(f"{name}: {list(shape)}")
            fits = [order for order in (False, True) if self._fits(shape, fact, inputs_first=order)]
            if len(fits) == 1:
                found[fits[0]].append(name)
        if either and bool(found[False]) == bool(found[True]):
            raise MappingError(
                f"files of {self.name} hold the inputs of experts as the second or the last dim, and sizes in "
                f"config.json do not tell which it is here:{listing(either)}\n"
                "Correct config.json, or name the experts in ignore"
            )
        return replace(self, inputs_first=bool(found[True]))

    def is_embedding(self, module: str) -> bool:
        """True if the module looks rows of its weight up, and is no linear layer to any engine."""
        found = self.fact(f"{module}.weight")
        if found is None or found.role is Role.MTP:
            return module.endswith(EMBEDDINGS)
        return found.role is Role.EMBEDDING

    def heads_without_tensor(self, names: Iterable[str]) -> list[str]:
        """The output layers whose weight is none of these tensors: they are tied to the embeddings."""
        stored = {found.module for name in names if (found := self.fact(name)) is not None}
        return [head for head in self.heads if f"{head}.weight" not in stored]

    def packs_experts(self, name: str, shape: tuple[int, ...]) -> bool:
        """True if the tensor holds several experts, in whatever layout."""
        found = self.fact(name)
        in_tower = found is not None and found.role is Role.TOWER and ".experts." in name and len(shape) == 3
        return in_tower or (found is not None and found.role in (Role.EXPERTS, Role.OPAQUE) and len(shape) > 1)

    def layout_of(self, name: str) -> PackedExperts:
        """How a tensor packs experts."""
        found = self.fact(name)
        if found is None:
            return PackedExperts()
        transposed = self.inputs_first if found.inputs_first is None else found.inputs_first
        return PackedExperts(transposed=transposed, interleaved=found.interleaved)

    def experts_in(self, name: str, shape: tuple[int, ...]) -> dict[str, PackedSource]:
        """The single experts in a tensor: name → where it lies; empty if the tensor packs no experts.

        Raises:
            MappingError: the outputs do not divide into the projections that the tensor holds.
        """
        found = self.fact(name)
        if found is None or found.role is not Role.EXPERTS or not found.holds or len(shape) < 2:
            return {}
        layout = self.layout_of(name)
        outputs = shape[-1] if layout.transposed or len(shape) < 3 else shape[1]
        if outputs % len(found.holds):
            parts = " and ".join(found.holds)
            raise MappingError(f"{name}: {list(shape)} does not divide into {parts} of {shape[0]} experts")
        parent, kind = _experts_module(name, found), "bias" if name.endswith("bias") else "weight"
        return {
            f"{parent}.{expert}.{projection}.{kind}": PackedSource(
                name, expert, part if len(found.holds) > 1 else None, layout
            )
            for expert in range(shape[0])
            for part, projection in enumerate(found.holds)
        }

    def number_of(self, name: str) -> int | None:
        """How many experts files number in the layer of a tensor, where it is not how many the model routes to."""
        found = self.fact(name)
        return None if found is None else self._size(found.numbers)

    def _size(self, expression: str | None) -> int | None:
        return None if expression is None else value_of(expression, self.sizes)

    def _fits(self, shape: tuple[int, ...], fact: Fact, *, inputs_first: bool) -> bool:
        found = (shape[0], shape[2], shape[1]) if inputs_first and len(shape) == 3 else shape
        if fact.shape is None:
            return True
        sizes = [self._size(each) for each in fact.shape]
        return len(sizes) == len(found) and all(size in (None, have) for size, have in zip(sizes, found, strict=True))

    def misfits(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What config.json says of a tensor's shape, if the tensor has another; None if it fits."""
        found = self.fact(name)
        if found is None or found.shape is None or not found.shape:
            return None
        orders = (False, True) if found.inputs_first is None else (False,)
        if any(self._fits(shape, found, inputs_first=order) for order in orders):
            return None
        sizes = " × ".join(f"{each} = {self._size(each)}" if each else "any" for each in found.shape)
        return f"{name}: {list(shape)}, but config.json says {sizes}"

    def other_names(self, modules: Iterable[str]) -> list[str]:
        """What transformers calls these modules where it is not what the files call them, and patterns for towers.

        Engines that build transformers' modules look for these names in `ignore`.
        """
        names: dict[str, None] = {}
        for module in modules:
            tensor = f"{module}.weight"
            found, prefix = self.fact(tensor), next((each for each in self.towers if tensor.startswith(each)), None)
            if prefix is not None:
                for each in self.towers[prefix]:
                    tower = re.escape(each.removesuffix(".")).replace(r"\*", r"\d+")
                    names[f"re:{tower}(\\.|$)"] = None
            elif found is not None and (spelled := _numbered(found.module, tensor)) not in (None, tensor):
                names[module_of(str(spelled))] = None
            names |= {
                twin + module.removeprefix(own): None for own, twin in self.twins.items() if module.startswith(own)
            }
        return list(names)

    def linears_without_suffix(self, names: Iterable[str]) -> list[str]:
        """Weights of linear modules that the files do not call `.weight`, with their modules' names in transformers."""
        found: dict[str, None] = {}
        for name in names:
            fact = self.fact(name)
            if fact is not None and fact.role is Role.CONVOLUTION and not name.endswith(".weight"):
                spelled = _numbered(fact.module, name)
                found |= dict.fromkeys([name, *([] if spelled is None else [module_of(spelled)])])
        return list(found)


def _numbered(module: str, tensor: str) -> str | None:
    """A module's weight by its pattern, with the numbers of the tensor in the files; `*/2` is half of the number.

    None if it has other numbers, or is no weight.
    """
    numbers, parts = _NUMBER.findall(tensor), _STAR.split(module)
    if len(parts) != 2 * len(numbers) + 1 or not module.endswith(".weight"):
        return None
    filled = [
        number if star == "*" else str(int(number) // 2) for star, number in zip(parts[1::2], numbers, strict=True)
    ]
    return "".join(part + number for part, number in zip(parts[::2], [*filled, ""], strict=True))


def pattern_of(name: str) -> str:
    """A tensor's name with `*` for each of its numbers, as the table's keys are."""
    return _NUMBER.sub("*", name)


def _experts_module(name: str, fact: Fact) -> str:
    """The module of the experts, spelled as the file spells its layers."""
    stored, inside = pattern_of(name), module_of(fact.module)
    if ".experts." in f".{name}":
        return name[: name.rindex("experts") + len("experts")]
    last = max((found.end() for found in _NUMBER_OR_STAR.finditer(name)), default=0)
    return name[:last] + (inside[inside.rindex("*") + 1 :] if "*" in stored else inside)


def value_of(expression: str, sizes: Mapping[str, Any]) -> int | None:
    """The value of a sum of products of fields and numbers; None if the configuration lacks a field of it."""
    total = 0
    for term in expression.split("+"):
        product = 1
        for factor in term.split("*"):
            value = int(factor) if factor.isdecimal() else sizes.get(factor)
            if not isinstance(value, int) or isinstance(value, bool):
                return None
            product *= value
        total += product
    return total


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that config.json names; None if it is not known.

    Files of one architecture may be spelled otherwise where config.json has a model type of its own, as EXAONE's for
    Llama. Such files name their authors' class for a task, so it is found by type and task. A classifier of a family is
    known as its language model is.
    """
    model_type = str(config.get("model_type"))
    for name in config.get("architectures") or ():
        if not isinstance(name, str):
            continue
        if (table := _table(name, model_type) or _table(relative_of(name) or "", model_type)) is not None:
            return _architecture(name, table, config)
        model = language_model_of(name)
        if model is not None and (table := _table(model, model_type)) is not None:
            return _with_head(_architecture(name, table, config))
    return None


def _with_head(known: Architecture) -> Architecture:
    """The architecture with transformers' head of a classifier in place of the output layer."""
    facts = {pattern: fact for pattern, fact in known.facts.items() if module_of(fact.module) not in known.heads}
    facts |= {f"{SCORE}.{kind}": Fact(Role.HEAD, f"{SCORE}.{kind}") for kind in ("weight", "bias")}
    return replace(known, facts=facts, heads=(SCORE,), tied=False)


@lru_cache(maxsize=8)
def _table(name: str, model_type: str) -> Mapping[str, Any] | None:
    if not name.isidentifier():
        return None
    file = _file_of_type(name, model_type) or KNOWN / f"{name}.json"
    if not file.is_file():  # published files may spell it as their authors did: KimiK25… for Kimi_K25…
        plain = name.replace("_", "").lower()
        spelled = [each for each in KNOWN.glob("*.json") if each.stem.replace("_", "").lower() == plain]
        if len(spelled) != 1:
            return None
        file = spelled[0]
    table: Mapping[str, Any] = json.loads(file.read_bytes())
    return table


def _file_of_type(name: str, model_type: str) -> Path | None:
    """The file of an architecture, or of one for the same task, with this model type; None if there is none."""
    if not model_type.isidentifier():
        return None
    files = sorted(KNOWN.glob(f"*.{model_type}.json"))
    named = [file for file in files if file.name.partition(".")[0] == name]
    if not named and not (KNOWN / f"{name}.json").is_file():
        named = [file for file in files if file.name.partition(".")[0].partition("For")[2] == name.partition("For")[2]]
    return named[0] if len(named) == 1 else None


def _architecture(name: str, table: Mapping[str, Any], config: Mapping[str, Any]) -> Architecture:
    part = config.get(table.get("text_config", ""))
    sizes = part if isinstance(part, Mapping) else config
    facts: dict[str, Fact] = {}
    for role in Role:
        for pattern, entry in table.get(role.value, {}).items():
            facts[pattern] = fact = _fact(role, pattern, entry)
            if role is Role.EXPERTS:
                for projection in fact.holds:
                    kind = "bias" if entry.get("bias") else "weight"
                    single = f"{_experts_module(pattern, fact)}.*.{projection}.{kind}"
                    facts.setdefault(single, Fact(Role.VECTOR if kind == "bias" else Role.LINEAR, single))
    output = table["output"]
    said = (sizes if output.get("nested") else config).get("tie_word_embeddings")
    return Architecture(
        name=name,
        sizes=sizes,
        base=table["base"],
        facts=facts,
        towers={prefix: tuple(each.get("modules", ())) for prefix, each in table.get("towers", {}).items()},
        heads=(*filter(None, [output["module"]]), *output.get("inner", ())),
        tied=bool(output.get("ties") and (output["tied"] if said is None else said)),
        unread=tuple(re.compile(each) for each in table.get("unused", ())),
        twins=table.get("twins", {}),
    )


def _fact(role: Role, pattern: str, entry: Mapping[str, Any]) -> Fact:
    shape = entry.get("shape")
    inputs_first = entry.get("inputs_first", False)
    return Fact(
        role,
        entry.get("module", pattern),
        None if shape is None else tuple(shape),
        tuple(entry.get("holds", ())),
        None if inputs_first == "either" else inputs_first,
        entry.get("interleaved", False),
        entry.get("bare", False),
        entry.get("numbers"),
    )
