"""What an engine makes of each architecture, from its model classes: one compact record each."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.class_tables import Mapper, Unreadable, added_entries, attribute, stacked
from tests.engines.module_tree import Built, Class, Kind, Program, Vocabulary

_VLLM_TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
_NO_LANGUAGE_MODEL = re.compile(
    r"(NextN|MTP|Eagle3?|Draft\w*|Spark\w*|Classification|RewardModel\w*|ForReward\w*|Embedding\w*|Assistant\w*)$"
)
_CONVOLUTIONS = ("conv1d", "conv", "q_conv1d", "k_conv1d", "v_conv1d")


@dataclass(frozen=True)
class Reading:
    """How to read one engine.

    Args:
        package: its name.
        vocabulary: what it calls things.
        mapper: class attribute with its renames.
        nested: True if classes that derive from `SupportsQuant` apply their tables wherever they are nested.
    """

    package: str
    vocabulary: Vocabulary
    mapper: str
    nested: bool


VLLM = Reading(
    "vllm",
    Vocabulary(
        experts=frozenset(("FusedMoE", "FusedMoEFactory", "RoutedExperts", "SharedFusedMoE")),
        language_models=frozenset(("init_vllm_registered_model",)),
    ),
    "hf_to_vllm_mapper",
    nested=True,
)
SGLANG = Reading(
    "sglang",
    Vocabulary(
        experts=frozenset(("FusedMoE", "DeepEPMoE", "EPMoE", "FlashInferFusedMoE")),
        makers_of_experts=frozenset(("get_moe_impl_class",)),
    ),
    "hf_to_sglang_mapper",
    nested=False,
)


def registry_of_vllm(root: Path) -> Iterator[tuple[str, tuple[str, str], bool]]:
    """Architecture, module and class, and True if vLLM has no model of its own but runs that of transformers."""
    tree = ast.parse((root / "vllm/model_executor/models/registry.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in _VLLM_TABLES:
            assert isinstance(node.value, ast.Dict)
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                module, cls = ast.literal_eval(value)
                dotted = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
                yield ast.literal_eval(key), (dotted, cls), module == "transformers"  # type: ignore[arg-type]


def registry_of_sglang(program: Program, root: Path) -> Iterator[tuple[str, Class]]:
    """Architecture and class: `EntryClass` of each module."""
    for file in sorted((root / "sglang/srt/models").rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EntryClass":
                for entry in node.value.elts if isinstance(node.value, ast.List) else [node.value]:
                    for cls in program.evaluate(entry, module, {}):
                        if isinstance(cls, Class) and not cls.name.startswith("Transformers"):
                            yield cls.name, cls


def records(reading: Reading, root: Path) -> dict[str, dict[str, Any] | None]:
    """Architecture → its record; None if the engine runs transformers' model."""
    if reading is VLLM:
        listed = list(registry_of_vllm(root))
        program = Program(root, reading.vocabulary, {name: at for name, at, _ in listed})
        classes = [(name, None if foreign else _only(program.resolve(*at))) for name, at, foreign in listed]
    else:
        program = Program(root, reading.vocabulary)
        classes = list(registry_of_sglang(program, root))
    wanted = {name: cls for name, cls in classes if not _NO_LANGUAGE_MODEL.search(name)}
    return {name: None if cls is None else record(reading, program, cls) for name, cls in sorted(wanted.items())}


def _only(values: Iterable[object]) -> Class:
    [cls] = [each for each in values if isinstance(each, Class)]
    return cls


def record(reading: Reading, program: Program, cls: Class) -> dict[str, Any]:
    """One architecture. Keys that say nothing are left out."""
    built, classes, hosted = program.build(cls)
    layers = _without_aliases(built)
    packed: dict[str, list[str]] = {}
    fused: dict[str, list[str]] = {}
    renames: list[list[str]] = []
    unread: list[str] = []
    for at, each in enumerate(classes):
        applies = at == 0 or (reading.nested and program.derives(each, "SupportsQuant"))
        try:
            mapper = attribute(program, each, reading.mapper)
            if isinstance(mapper, Mapper):
                renames += [rename for rename in mapper.renames if applies and rename not in renames]
                for member, (whole, _) in mapper.stacked.items():
                    fused.setdefault(_leaf(whole), []).append(_leaf(member))
        except Unreadable as error:
            unread.append(f"{each.name}.{reading.mapper}: {error}")
        if applies:
            try:
                packed |= attribute(program, each, "packed_modules_mapping") or {}
            except Unreadable as error:
                unread.append(f"{each.name}.packed_modules_mapping: {error}")
            for key, members in added_entries(program, each, "packed_modules_mapping"):
                packed.setdefault(key, members)
        for whole, member in stacked(program, each):
            fused.setdefault(_leaf(whole), []).append(_leaf(member))
    found = {
        "renames": renames,
        "packed": {key: members for key, members in packed.items() if list(members) != [key]},
        "fuses": {
            each.path: list(dict.fromkeys(fused[_leaf(each.path)]))
            for each in layers
            if each.kind is Kind.LINEAR and _leaf(each.path) not in fused.get(_leaf(each.path), [_leaf(each.path)])
        },
        "unquantized": _unquantized(layers),
        "asks": _asks(layers),
        "experts": next((list(each.parts) for each in layers if each.parts), None),
        "head": any(each.quantizable for each in layers if each.kind is Kind.HEAD),
        "embedding": any(each.quantizable for each in layers if each.kind is Kind.EMBEDDING),
        "hosts": sorted({prefix for prefix, name in hosted if not name}),
        "unread": unread,
    }
    return {key: value for key, value in found.items() if value or key in ("head", "embedding")}


def _leaf(path: str) -> str:
    return path.strip(".").rpartition(".")[2]


def _without_aliases(built: Iterable[Built]) -> list[Built]:
    """A layer that is handed to another module is found there once more: the prefix tells where it belongs."""
    every = list(dict.fromkeys(built))
    paths = {each.path for each in every}
    aliases = {each for each in every if each.asked and each.path not in each.asked and each.asked & paths}
    return sorted((each for each in every if each not in aliases), key=lambda each: each.path)


def _unquantized(layers: Iterable[Built]) -> list[str]:
    """Paths of linear layers that are built without the quantization config, wherever they are built."""
    by_path: dict[str, list[Built]] = {}
    for each in layers:
        if each.kind in (Kind.LINEAR, Kind.PLAIN, Kind.EXPERTS) and _leaf(each.path) not in _CONVOLUTIONS:
            by_path.setdefault(each.path, []).append(each)
    return [path for path, found in sorted(by_path.items()) if not any(each.quantizable for each in found)]


def _asks(layers: Iterable[Built]) -> Mapping[str, str]:
    """Path → the name by which the quantization config is asked, where another name is given."""
    found: dict[str, set[str]] = {}
    for each in layers:
        if each.kind is Kind.LINEAR and each.quantizable:
            found.setdefault(each.path, set()).update(each.asked)
    return {
        path: name
        for path, names in sorted(found.items())
        if path not in names and len(names) == 1
        for name in names
        if name.count("*") == path.count("*") and name
    }
