r"""Regular expressions of an untrusted config.json, matched in time that grows linearly with the name.

Engines match `re:` targets with Python's `re`, which tries one way through a pattern after another: `(a+)+$` takes
twice as long for each further `a`. Here all ways are followed at once (Thompson, 1968; Pike). Whether a name matches
does not depend on the order in which ways are tried, so the answer is `re`'s own. `re` parses the pattern and judges
single characters and places such as `$` and `\b`, so flags, classes and Unicode mean what they mean there. Where a
pattern leaves `re` few ways through a name, as nearly all do, `re` is asked itself: it is a hundred times faster.

Back-references and conditions need more than that, and possessive or atomic groups depend on the order: they are
refused, as is a pattern whose repetitions, written out, have more than 10,000 steps.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from re import _compiler, _parser  # type: ignore[attr-defined]
from re import _constants as op  # type: ignore[attr-defined]
from typing import Any

_MOST_STEPS = 10_000
_LONGEST = 10_000  # characters of a pattern
_FEW_WAYS = 20_000  # of `re` through a name: less than a millisecond


class UnsupportedPattern(ValueError):
    """A pattern that cannot be matched in linear time, or that is none."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A state of the automaton: what must hold to pass it, and the states that follow.

    Args:
        after: numbers of the following states.
        character: a pattern for the one character that is consumed; None if none is.
        place: a pattern for the place in the name, `$` or `\\b`.
        look: an assertion about what follows or precedes, True if it must hold.
        back: for a look behind, the characters that it goes back.
    """

    after: tuple[int, ...]
    character: re.Pattern[str] | None = None
    place: re.Pattern[str] | None = None
    look: tuple["LinearPattern", bool] | None = None
    back: int = 0


_END = -1
"""The state after the last: the pattern has matched."""


class LinearPattern:
    """A compiled pattern. Transitions are kept, so a second name with the same beginning costs a look-up a character.

    Args:
        pattern: a pattern as `re` takes it.
        few_ways: the most ways through a name at which `re` is asked itself; 0 for never.

    Raises:
        UnsupportedPattern: it is no pattern, or one of those that are refused.
    """

    def __init__(self, pattern: str, *, few_ways: int = _FEW_WAYS) -> None:
        if len(pattern) > _LONGEST:
            raise UnsupportedPattern(f"{len(pattern):,} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of syntax that a later Python may read in another way
                tree = _parser.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UnsupportedPattern(str(error)) from error
        self._set(tree, tree.state, tree.state.flags)
        self._quick: re.Pattern[str] = _compiler.compile(tree, tree.state.flags & ~re.DEBUG)
        self._factor, self._degree = _ways(tree)
        self._few_ways = few_ways

    def _set(self, tree: Any, state: Any, flags: int) -> None:
        self._state = state
        self._steps: list[_Step] = []
        self._start = self._sequence(tree, flags, _END)
        self._next: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._closed: dict[frozenset[int], tuple[frozenset[int], bool]] = {}

    def matches(self, name: str) -> bool:
        """True if the pattern matches from the beginning of the name, as `re.match`."""
        if self._degree < _MANY and self._factor * len(name) ** self._degree <= self._few_ways:
            return self._quick.match(name) is not None
        return self._matches(name, 0, len(name))

    def _matches(self, name: str, begin: int, end: int, *, whole: bool = False) -> bool:
        """True if the pattern matches a part of the name from `begin`; up to `end` itself if `whole`."""
        current = frozenset((self._start,))
        for at in range(begin, end + 1):
            waiting, found = self._close(current, name, at)
            if found and (at == end or not whole):
                return True
            if not waiting or at == end:
                return False
            key = (waiting, name[at])
            if key not in self._next:
                passed = (self._steps[each] for each in waiting)
                self._next[key] = frozenset(
                    after
                    for step in passed
                    if step.character is not None and step.character.match(name[at])
                    for after in step.after
                )
            current = self._next[key]
        return False

    def _close(self, states: frozenset[int], name: str, at: int) -> tuple[frozenset[int], bool]:
        """The states that wait for a character after all steps that consume none; and if the end is among them."""
        known = self._closed.get(states)
        if known is not None:
            return known
        todo, seen, waiting, constant = list(states), set(states), set[int](), True
        while todo:
            number = todo.pop()
            if number == _END:
                continue
            step = self._steps[number]
            if step.character is not None:
                waiting.add(number)
                continue
            if step.place is not None or step.look is not None:
                constant = False
                if not _holds(step, name, at):
                    continue
            todo += [after for after in step.after if after not in seen]
            seen.update(step.after)
        closed = frozenset(waiting), _END in seen
        if constant:  # it does not depend on the place
            self._closed[states] = closed
        return closed

    def _add(self, step: _Step) -> int:
        if len(self._steps) >= _MOST_STEPS:
            raise UnsupportedPattern(f"its repetitions have more than {_MOST_STEPS:,} steps")
        self._steps.append(step)
        return len(self._steps) - 1

    def _sequence(self, items: Sequence[Any], flags: int, after: int) -> int:
        """Adds the steps of a sequence; returns its first state."""
        for item in reversed(list(items)):
            after = self._item(item, flags, after)
        return after

    def _item(self, item: Any, flags: int, after: int) -> int:
        kind, argument = item
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return self._add(_Step((after,), character=self._compiled(item, flags)))
        if kind is op.AT:
            return self._add(_Step((after,), place=self._compiled(item, flags)))
        if kind is op.SUBPATTERN:
            _, added, removed, inner = argument
            return self._sequence(inner, (flags | added) & ~removed, after)
        if kind is op.BRANCH:
            return self._add(_Step(tuple(self._sequence(each, flags, after) for each in argument[1])))
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(argument, flags, after)
        if kind in (op.ASSERT, op.ASSERT_NOT):
            direction, inner = argument
            least, most = inner.getwidth()
            if direction < 0 and least != most:
                raise UnsupportedPattern("look-behind requires fixed-width pattern")
            look = LinearPattern.__new__(LinearPattern)
            look._set(inner, self._state, flags)
            back = most if direction < 0 else 0
            return self._add(_Step((after,), look=(look, kind is op.ASSERT), back=back))
        if kind is op.FAILURE:
            return self._add(_Step(()))
        raise UnsupportedPattern(f"{str(kind).lower()} cannot be matched in linear time")

    def _repeat(self, argument: Any, flags: int, after: int) -> int:
        least, most, inner = argument
        if most is op.MAXREPEAT:
            loop = self._add(_Step(()))
            self._steps[loop] = _Step((self._sequence(inner, flags, loop), after))
            after = loop
        else:
            done = after
            for _ in range(most - least):
                after = self._add(_Step((self._sequence(inner, flags, after), done)))
        for _ in range(least):
            after = self._sequence(inner, flags, after)
        return after

    def _compiled(self, item: Any, flags: int) -> re.Pattern[str]:
        single = _parser.SubPattern(self._state, [item])
        found: re.Pattern[str] = _compiler.compile(single, flags & ~re.DEBUG)
        return found


_MANY = 8
"""A number of repetitions, one after another, that is never tried in turn."""


def _ways(items: Sequence[Any]) -> tuple[int, int]:
    """At most how many ways `re` tries through a name of length n, as (factor, degree): factor times n ** degree."""
    factor, degree = 1, 0
    for kind, argument in items:
        inner: list[Any] = []
        if kind is op.BRANCH:
            inner = argument[1]
            factor *= len(inner)
        elif kind is op.SUBPATTERN:
            inner = [argument[3]]
        elif kind in (op.ASSERT, op.ASSERT_NOT):
            inner = [argument[1]]
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, repeated = argument
            inside = _ways(repeated)
            if inside != (1, 0) and most > 1:
                return 1, _MANY  # one repetition in another: exponential
            inner = [repeated]
            degree += most != least
        for each in inner:
            more = _ways(each)
            factor, degree = min(factor * more[0], _FEW_WAYS + 1), min(degree + more[1], _MANY)
    return factor, degree


def _holds(step: _Step, name: str, at: int) -> bool:
    if step.place is not None:
        return step.place.match(name, at) is not None
    assert step.look is not None
    pattern, wanted = step.look
    if step.back:
        found = at >= step.back and pattern._matches(name, at - step.back, at, whole=True)
    else:
        found = pattern._matches(name, at, len(name))
    return found is wanted
