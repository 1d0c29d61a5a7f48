"""The lines that a family lacks, guessed for the message about tensors that no mapping takes.

A guess has to be read before it is used: it puts the tensor where the family's other tensors of the same module are,
and takes the class that Megatron's own layer of that name needs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher

from amaxbridge.mappings.names import is_quantizer_state, kind_of, module_of
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.mappings.tensors import TensorSpec

_MOST = 20
_ALIKE = 0.6  # of names, as SequenceMatcher counts
_FUSED = {  # Megatron's linear → class, and the Hugging Face modules that it is made of, by role
    "linear_qkv": ("QKVMapping", {"q": "q_proj", "k": "k_proj", "v": "v_proj"}),
    "linear_fc1": ("GatedMLPMapping", {"gate": "gate_proj", "up": "up_proj"}),
}
_CLASSES = {
    "word_embeddings": "VocabParallelMapping",
    "output_layer": "VocabParallelMapping",
    "linear_fc2": "RowParallelMapping",
    "linear_proj": "RowParallelMapping",
    "out_proj": "RowParallelMapping",
}
_SHARDED = "ColumnParallelMapping if ranks hold its rows, RowParallelMapping if its columns"

type Kinds = Mapping[str, TensorSpec | None]


def lines_to_add(registry: MappingRegistry, *, megatron: Kinds | None = None, hf: Kinds | None = None) -> str:
    """The end of a message: what to add, and where.

    Args:
        registry: the mappings of the family.
        megatron: global Megatron names → specs if known. Those that have a mapping are left out.
        hf: Hugging Face names that no mapping writes → specs if known.
    """
    where = registry.file or "a family file of your own (family=FILE.py, docs/custom-models.md)"
    unmapped = {name: spec for name, spec in (megatron or {}).items() if registry.megatron_to_hf_lookup(name) is None}
    lines = list(dict.fromkeys(_lines(registry, _by_kind(unmapped), _by_kind(hf or {}))))
    more = [f"    … and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    shown = "\n".join([*(f"    {line}" for line in lines[:_MOST]), *more])
    return f"add these lines to the mappings of {where}, once you have checked names and classes:\n{shown}"


def _by_kind(names: Kinds) -> dict[str, TensorSpec | None]:
    return {kind_of(name): spec for name, spec in names.items() if not is_quantizer_state(name)}


def _lines(registry: MappingRegistry, megatron: Kinds, hf: Kinds) -> Iterator[str]:
    pairs = [(each.megatron_param, target) for each in registry if not is_quantizer_state(each.megatron_param)
             for target in each.targets]  # fmt: skip
    left = dict(hf)
    for name, spec in megatron.items():
        fused = _fused(registry, name, left)
        guess = _moved(name, pairs)
        if (beside := _like_the_weight(registry, name)) is not None:
            yield beside
        elif fused is not None:
            kind, modules = fused
            parent, last = module_of(module_of(guess)), name.rpartition(".")[2]
            targets = {role: f"{parent}.{module}.{last}" for role, module in modules.items()}
            left = {each: left[each] for each in left if each not in targets.values()}
            yield _line(kind, name, targets)
        else:
            target = _nearest(guess, spec, left, alone=len(megatron) == 1)
            left.pop(target, None)
            yield _one_to_one(name, target, spec)
    turned = [(target, name) for name, target in pairs]
    for target in list(left):
        spec = left.pop(target, None)
        parent, module = module_of(module_of(target)), module_of(target).rpartition(".")[2]
        found = next(
            ((linear, kind, roles) for linear, (kind, roles) in _FUSED.items() if module in roles.values()), None
        )
        if found is None:
            yield _one_to_one(_moved(target, turned), target, spec)
            continue
        linear, kind, roles = found
        last = target.rpartition(".")[2]
        yield _line(
            kind,
            f"{module_of(module_of(_moved(target, turned)))}.{linear}.{last}",
            {role: f"{parent}.{each}.{last}" for role, each in roles.items()},
        )


def _fused(registry: MappingRegistry, name: str, hf: Kinds) -> tuple[str, Mapping[str, str]] | None:
    """The class and modules of a fused linear. Attention's always is; an MLP's is where there is a gate."""
    linear = module_of(name).rpartition(".")[2]
    kind, modules = _FUSED.get(linear, ("", {}))
    gate = modules.get("gate")
    if gate is None or any(f".{gate}." in target for each in registry for target in (*each.targets, *hf)):
        return (kind, modules) if kind else None
    return None


def _like_the_weight(registry: MappingRegistry, name: str) -> str | None:
    """The line of a bias whose weight has a mapping."""
    weight = f"{name.removesuffix('.bias')}.weight"
    found = next((each for each in registry if each.megatron_param == weight), None) if name.endswith(".bias") else None
    if found is None:
        return None
    targets = {role: f"{target.removesuffix('.weight')}.bias" for role, target in found.roles.items()}
    kind = type(found).__name__
    return _line("ReplicatedMapping" if kind == "RowParallelMapping" else kind, name, targets)


def _one_to_one(name: str, target: str, spec: TensorSpec | None) -> str:
    kind = _CLASSES.get(module_of(name).rpartition(".")[2])
    wide = spec is not None and len(spec.shape) > 1
    line = _line(kind or "ReplicatedMapping", name, {"": target})
    return f"{line}  # {_SHARDED}" if wide and kind is None else line


def _line(kind: str, name: str, targets: Mapping[str, str]) -> str:
    given = ", ".join(f'{role}="{target}"' if role else f'"{target}"' for role, target in targets.items())
    return f'{kind}("{name}", {given}),'


def _moved(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A name on one side, moved to where the other side has the tensors that share most of its path.

    Args:
        pairs: the family's names: those of this side, each with one of the other.
    """
    parts = name.split(".")
    shared = {one: _common(parts, one.split(".")) for one, _ in pairs}
    for depth in range(max(shared.values(), default=0), 0, -1):
        places: Counter[str] = Counter()
        for one, other in pairs:
            beyond, there = len(one.split(".")) - depth, other.split(".")
            if shared[one] >= depth and len(there) > beyond:
                place = ".".join([*there[: len(there) - beyond], *parts[depth:]])
                places[place] += place.count("*") == name.count("*")
        if places and (best := places.most_common(1)[0])[1]:
            return best[0]
    return name


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Number of equal parts at the beginning; never all, since the tensor itself has no mapping."""
    count = 0
    for first, second in zip(one[:-1], other[:-1], strict=False):
        if first != second:
            break
        count += 1
    return count


def _nearest(guess: str, spec: TensorSpec | None, left: Kinds, *, alone: bool) -> str:
    """The Hugging Face tensor without a mapping that is most like the guess, else the guess.

    Args:
        alone: no other Megatron tensor lacks a mapping: a single tensor of Hugging Face is its own, whatever its name.
    """
    fitting = [
        each
        for each, other in left.items()
        if each.count("*") == guess.count("*") and (spec is None or other is None or spec.shape == other.shape)
    ]
    if alone and len(fitting) == len(left) == 1:
        return fitting[0]
    likeness = {each: SequenceMatcher(None, guess, each).ratio() for each in fitting}
    best = max(likeness, key=lambda each: likeness[each], default=guess)
    return best if likeness.get(best, 0.0) >= _ALIKE else guess
