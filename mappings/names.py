"""Parameter names with wildcards: the only place that knows about wildcards or regular expressions.

A pattern is a name as the field writes it: `model.layers.*.mlp.experts.*.up_proj.weight`. `*` stands for
one number and `**` for any path. `match` gives the captured text in the order of the wildcards, `resolve` puts
captures back, so `match(resolve(captures)) == captures`.

Two patterns of one mapping may hold the same wildcards in different orders (`**.layers.*` against `layers.*.**`).
`translate` therefore assigns captures by kind, numbers to numbers and paths to paths, never by position.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

_WILDCARD = re.compile(r"\*\*|\*")
_REGEX = {"*": r"(\d+)", "**": r"(.+)"}
_DIGITS = re.compile(r"(\d+)")
_NUMBER_INSIDE = re.compile(r"(?<=\.)(\d+)(?=\.)")  # number of a layer or expert, but not the 1 of w1
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\.weight)\d+$|(?<=\.bias)\d+$")  # but not the 1 of fc1

_QUANTIZER = re.compile(r"(?<!vector)_quantizer")

Captures = tuple[str, ...]


@dataclass(frozen=True)
class NamePattern:
    """A parameter name with wildcards, `*` for one number and `**` for any path."""

    text: str

    @cached_property
    def wildcards(self) -> tuple[str, ...]:
        """The wildcards in the order of the name, each `*` or `**`."""
        return tuple(_WILDCARD.findall(self.text))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        literals = _WILDCARD.split(self.text)
        parts = [re.escape(literals[0])]
        for wildcard, literal in zip(self.wildcards, literals[1:], strict=True):
            parts += [_REGEX[wildcard], re.escape(literal)]
        return re.compile("".join(parts))

    def match(self, name: str) -> Captures | None:
        """The text under each wildcard if the whole `name` matches, else None."""
        found = self._regex.fullmatch(name)
        return found.groups() if found else None

    def resolve(self, captures: Sequence[str]) -> str:
        """The name with `captures` in place of the first `len(captures)` wildcards; later ones stay."""
        remaining = iter(captures)
        return _WILDCARD.sub(lambda wildcard: next(remaining, wildcard.group()), self.text)

    def translate(self, captures: Sequence[str], target: "NamePattern") -> str:
        """`target` resolved with captures of this pattern, numbers to `*` and paths to `**`.

        A wildcard of `target` for which this pattern has no capture stays: the expert wildcard of a fan-out.
        """
        by_kind = {
            kind: iter([text for wildcard, text in zip(self.wildcards, captures, strict=False) if wildcard == kind])
            for kind in _REGEX
        }
        return _WILDCARD.sub(lambda found: next(by_kind[found.group()], found.group()), target.text)


@cache
def pattern(text: str) -> NamePattern:
    """The pattern of `text`, compiled once for the process."""
    return NamePattern(text)


def natural_key(name: str) -> tuple[str | int, ...]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    return tuple(int(part) if index % 2 else part for index, part in enumerate(_DIGITS.split(name)))


def split_at_numbers(name: str) -> list[str]:
    """The parts of a module's or tensor's name between the numbers of layers and experts: `a.3.b` → `a.`, `3`, `.b`."""
    return _NUMBER_INSIDE.split(name)


def kind_of(name: str) -> str:
    """A name without the numbers of layers and experts: tensors of one kind are alike."""
    return _NUMBER.sub("*", name)


def module_of(tensor_name: str) -> str:
    """The module that owns a tensor: `a.q_proj` for `a.q_proj.weight`."""
    return tensor_name.rpartition(".")[0]


def is_quantizer_state(name: str) -> bool:
    """True if a Megatron or HF name is that of a quantizer, or of a quantizer's buffer.

    The vector quantizers of audio codecs are layers with weights.
    """
    return _QUANTIZER.search(name) is not None


def is_routed_expert(name: str) -> bool:
    """True if a Megatron or HF name lies inside the routed experts of a mixture-of-experts layer."""
    return ".experts." in f".{name}"


def overlap(one: str, other: str) -> bool:
    """True if some name matches both patterns.

    Each pattern is read as a row of atoms, a literal character or a wildcard that repeats, and both rows are walked
    together: from a pair of positions every step consumes one character that suits both atoms.
    """
    first, second = _WILDCARD_OR_CHARACTER.findall(one), _WILDCARD_OR_CHARACTER.findall(other)
    seen, todo = set[tuple[int, int]](), [(0, 0)]
    while todo:
        at = i, j = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if i == len(first) and j == len(second):
            return True
        if i < len(first) and j < len(second) and _share_a_character(first[i], second[j]):
            todo += [(a, b) for a in _next(first, i) for b in _next(second, j)]
    return False


_WILDCARD_OR_CHARACTER = re.compile(r"\*\*|.")


def _next(atoms: Sequence[str], at: int) -> Sequence[int]:
    return (at, at + 1) if atoms[at] in _REGEX else (at + 1,)


def _share_a_character(one: str, other: str) -> bool:
    if "**" in (one, other) or one == other:
        return True
    literal = other if one == "*" else one
    return "*" in (one, other) and literal.isdigit()
