"""What vLLM and SGLang make of a layer under ModelOpt's config, by rules of their own; and entries both read right.

An entry of `exclude_modules` is a name or a wildcard. ModelOpt means just what it matches; the engines mean more:

    vLLM    first names: all members of a fused layer, or a layer of experts that an entry's name has as a part; then
            every layer whose name has the entry as a part: `mlp.gate` excludes `mlp.gate_up_proj`; then wildcards
    SGLang  names and whole parts of paths; then wildcards, for a path or one of its parts; and an entry that ends in
            `kv_b_proj` (or another projection of MLA) for that projection in every layer. Of experts, wildcards alone

In MIXED_PRECISION, both look up the algorithm of each layer, or of its members, or of what lies below it.
tests/golden/modelopt_matchers.json holds the answers of the engines' own matchers, which a test compares with these.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from amaxbridge.export.architectures.engine_tables import GENERIC
from amaxbridge.export.architectures.engines import SGLANG, VLLM, Engine, Layer, Reading, fused_name
from amaxbridge.export.modelopt_config import EVERY_MODULE
from amaxbridge.export.quant_config import QuantConfig

_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
_EXPERTS = ".experts"
_TOWER = "language_model."
_UNQUANTIZED_IN_VLLM = ("vision_tower", "vision_model", "vit_large_projector")
_EVERYWHERE_IN_SGLANG = frozenset(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
_ALWAYS_FUSED = ("qkv_proj", "gate_up_proj")


# Writing


def excluded_entries(unquantized: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """`exclude_modules` for unquantized modules, so that neither engine excludes another layer, or misses one.

    A name that is a part of a quantized layer's name has its last letter in brackets, which makes it a wildcard for
    itself alone. Experts of which none is quantized are one wildcard, the only entry that SGLang takes for them.
    """
    parts = {_EXPERT.sub(r"\1", name) for name in quantized}
    layers = "\n".join({*parts, *map(fused_name, parts)})
    experts = {found[1] for name in unquantized if (found := _EXPERT.fullmatch(name)) and found[1] not in parts}
    single = (name for name in unquantized if _EXPERT.sub(r"\1", name) not in experts)
    return sorted(
        [
            *(f"{name[:-1]}[{name[-1]}]" if name in layers else name for name in single),
            *(f"{each}*" for each in experts),
        ]
    )


# Reading


def read_in_modelopt(engine: Engine, layer: Layer, config: QuantConfig) -> Reading | None:
    """What an engine makes of a layer under a config of ModelOpt; None for an engine that has no reader of it.

    Args:
        layer: a linear layer, or all experts of a layer as one, whose name ends in `.experts`.
        config: with the engine's names, see `engines.as_named_by`.
    """
    excluded = _EXCLUDED.get(engine.key)
    if excluded is None:
        return None
    try:
        entry = excluded(layer, engine_entries(engine, config.excluded))
        if entry is not None:
            return Reading(why=f"ignored by {entry!r}")
        if any(EVERY_MODULE in group.targets for group in config.groups):
            tower = next((name for name in _UNQUANTIZED_IN_VLLM if name in layer.name), None)
            if engine is VLLM and tower is not None:
                return Reading(why=f"in 16 bits, because its name has {tower}")
            return Reading(0)
        group = _looked_up(engine, layer, config)
    except _ConflictError as conflict:
        return Reading(conflict=str(conflict))
    return Reading(group, "" if group is not None else "neither in quantized_layers nor excluded")


def engine_entries(engine: Engine, entries: Sequence[str]) -> list[str]:
    """Entries of `exclude_modules`, renamed already, as the engine keeps them."""
    if engine is SGLANG:
        both = ((entry, entry.removeprefix(_TOWER)) for entry in entries)
        return list(dict.fromkeys(name for pair in both for name in pair))
    return list(entries)


class _ConflictError(Exception):
    """An engine refuses the config; says why."""


def _by_vllm(layer: Layer, entries: Sequence[str]) -> str | None:
    """The entry that excludes a layer in vLLM: `ModelOptQuantConfigBase.is_layer_excluded`."""
    name = layer.name
    if name in entries and (_is_fused(layer) or "experts" not in name):
        return name
    entry = None
    if _is_fused(layer):
        entry = _of_members(layer.members, lambda member: member if member in entries else None)
    elif "experts" in name:
        entry = next((each for each in entries if "experts" in each and name in each), None)
    if entry is not None:
        return entry
    inner = name.removeprefix(_TOWER)
    part = next((each for each in entries if each != name and (each in name or each in inner)), None)
    return part or next((each for each in entries if fnmatchcase(name, each)), None)


def _by_sglang(layer: Layer, entries: Sequence[str]) -> str | None:
    """The entry that excludes a layer in SGLang: `is_layer_skipped` for all but experts, and `is_layer_excluded`."""
    name = layer.name
    if not name.endswith(_EXPERTS) and (entry := _by_path(layer, entries)) is not None:
        return entry
    names = (name, name.removeprefix(_TOWER))
    for each in entries:
        pattern = re.compile(each.replace(".", r"\.").replace("*", ".*"))
        if any(pattern.fullmatch(part) for whole in names for part in (whole, *whole.split("."))):
            return each
        last = each.rpartition(".")[2]
        if last in _EVERYWHERE_IN_SGLANG and last in name.rpartition(".")[2]:
            return each
    return None


def _by_path(layer: Layer, entries: Sequence[str]) -> str | None:
    parent, dot, leaf = layer.name.rpartition(".")
    members = layer.members
    if not _is_fused(layer) and leaf in _ALWAYS_FUSED:
        members = tuple(parent + dot + member for member in GENERIC.packed[leaf])
    if members != (layer.name,):
        return _of_members(members, lambda member: _lies_in(entries, member))
    if (entry := _lies_in(entries, layer.name)) is not None or "experts" not in layer.name:
        return entry
    return next((each for each in entries if "experts" in each and layer.name in each), None)


def _lies_in(entries: Sequence[str], name: str) -> str | None:
    """The entry that names a module, or a part of its path."""
    return next((each for each in entries if f".{each.rstrip('.')}." in f".{name}."), None)


def _of_members(members: Sequence[str], excluded: Callable[[str], str | None]) -> str | None:
    found = {member: entry for member in members if (entry := excluded(member)) is not None}
    if found and len(found) < len(members):
        raise _ConflictError(f"ignored in part: {', '.join(found)}")
    return next(iter(found.values()), None)


_EXCLUDED: Mapping[str, Callable[[Layer, Sequence[str]], str | None]] = MappingProxyType(
    {VLLM.key: _by_vllm, SGLANG.key: _by_sglang}
)


def _looked_up(engine: Engine, layer: Layer, config: QuantConfig) -> int | None:
    """The group of a layer in MIXED_PRECISION: `_resolve_quant_algo`."""
    groups = {name: number for number, group in enumerate(config.groups) for name in group.targets}
    parent, dot, leaf = layer.name.rpartition(".")
    names = _also_called(engine, layer.name)
    if (found := next((groups[name] for name in names if name in groups), None)) is not None:
        return found
    members = [member.rpartition(".")[2] for member in layer.members] if _is_fused(layer) else []
    parents = [each + dot for each in _also_called(engine, parent)]
    if (found := _unanimous(groups, (base + member for base in parents for member in members))) is not None:
        return found
    below = (groups[each] for name in names for each in groups if each.startswith(f"{name}."))
    if (found := next(below, None)) is not None:
        return found
    if engine is not VLLM:
        return None
    if layer.name.endswith(_EXPERTS):
        return next((number for name, number in groups.items() if name.startswith(parent + dot)), None)
    for name in names if leaf in _ALWAYS_FUSED else ():
        base = name.rpartition(".")[0]
        if (found := _unanimous(groups, (f"{base}.{member}" for member in GENERIC.packed[leaf]))) is not None:
            return found
    return None


def _unanimous(groups: Mapping[str, int], names: Iterable[str]) -> int | None:
    found = {name: groups[name] for name in names if name in groups}
    if len(set(found.values())) > 1:
        raise _ConflictError(f"quantized differently: {', '.join(found)}")
    return next(iter(found.values()), None)


def _also_called(engine: Engine, name: str) -> list[str]:
    """The names by which an engine looks a layer up in `quantized_layers`."""
    found = [name, *(["lm_head"] if name.endswith(".lm_head") else [])]
    inner, outer = "model.language_model.", "language_model.model."
    if name.startswith(outer):
        found.append(inner + name.removeprefix(outer))
    elif name.startswith(inner):
        found.append(outer + name.removeprefix(inner))
        found += ["model." + name.removeprefix(inner)] if engine is SGLANG else []
    elif name.startswith("model.") and engine is SGLANG:
        found.append(inner + name.removeprefix("model."))
    return found


def _is_fused(layer: Layer) -> bool:
    return layer.members != (layer.name,)
