"""Sizes of a tensor as expressions in the fields of a configuration, found by comparing several models."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from amaxbridge.export.architectures.facts import value_of
from amaxbridge.mappings.model_config import number_of_experts

LARGER = "larger"
"""What the names of models whose sizes differ from the others' begin with."""


def expressions(
    shapes: Mapping[str, tuple[int, ...] | None], configs: Mapping[str, Mapping[str, Any]]
) -> list[str | None] | None:
    """For each dim an expression that is right in every model, or None; None for all if the rank differs.

    Args:
        shapes: model → the tensor's shape there; None if it has several.
        configs: model → the fields of its language model's configuration.
    """
    seen = [(shape, _sizes(configs[model])) for model, shape in shapes.items() if shape is not None]
    ranks = {len(shape) for shape, _ in seen}
    if len(seen) < len(shapes) or len(ranks) > 1:
        return None
    if not any(model.startswith(LARGER) for model in shapes):
        return [None] * ranks.pop()
    return [_expression([(shape[dim], sizes) for shape, sizes in seen]) for dim in range(ranks.pop())]


def count(numbers: Mapping[str, int], configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """An expression for how many experts a layer's files number in every model; None if the models route to as many.

    Raises:
        ValueError: no expression is right in every model.
    """
    seen = [(number, configs[model]) for model, number in numbers.items()]
    if all(number == number_of_experts(config) for number, config in seen):
        return None
    sized = [(number, _sizes(config)) for number, config in seen]
    fields = sorted(name for name in set.intersection(*(set(sizes) for _, sizes in sized)) if "expert" in name)
    candidates = [*(f"2*{name}" for name in fields), *(f"{one}+{other}" for one, other in combinations(fields, 2))]
    fitting = [each for each in candidates if all(value_of(each, sizes) == number for number, sizes in sized)]
    if len(fitting) != 1:
        raise ValueError(f"experts are numbered to {sorted(set(numbers.values()))}, which is {fitting or 'no sum'}")
    return fitting[0]


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {name: value for name, value in config.items() if type(value) is int and value > 1}


def _expression(seen: list[tuple[int, Mapping[str, int]]]) -> str | None:
    common = set.intersection(*(set(sizes) for _, sizes in seen))
    varied = (name for name in common if len({sizes[name] for _, sizes in seen}) > 1)  # any other may fit by chance
    fields = sorted(varied, key=lambda name: (len(name), name))
    for candidates in _candidates(fields):
        fitting = [each for each in candidates if all(value_of(each, sizes) == size for size, sizes in seen)]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None  # several: some fit by chance
    return None


def _candidates(fields: list[str]) -> Iterator[Iterable[str]]:
    """Expressions, the simplest kinds first."""
    dims = [name for name in fields if "dim" in name or "size" in name or "rank" in name]
    counts = [
        name for name in fields if ("head" in name or "shared" in name) and "dim" not in name and "size" not in name
    ]
    yield fields
    yield (f"{factor}*{name}" for factor in (2, 3, 4) for name in fields)
    yield (f"{count}*{dim}" for count in counts for dim in dims)
    yield (f"2*{count}*{dim}" for count in counts for dim in dims)
    yield (f"{one}+{other}" for one, other in combinations(dims, 2))
    yield (f"{count}*{one}+{count}*{other}" for count in counts for one, other in combinations(dims, 2))
