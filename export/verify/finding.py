"""Rules and findings.

A rule declares what must hold, a check, and what a serving engine does where it does not hold. The check only names
tensors and says what is wrong with each; the rest is the same for all of them and is stated once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.mendable import MENDABLE


class Severity(StrEnum):
    """An error makes a checkpoint unfit to serve; a warning is for people to judge; a note is information."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Problem(NamedTuple):
    """A tensor, module, file or key, and what is wrong with it.

    Args:
        engine: key of the engine that has the problem; "" for all.
    """

    subject: str
    what: str
    engine: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that a checkpoint breaks, with every place.

    Args:
        rule: name of the rule.
        severity: how bad it is.
        problems: every place, and what is wrong there.
        effect: what happens in a serving engine.
        next_step: what to do about it.
    """

    rule: str
    severity: Severity
    problems: tuple[Problem, ...]
    effect: str
    next_step: str

    def of(self, engine: str) -> tuple[Problem, ...]:
        """The problems that an engine has: those of all engines, and its own."""
        return tuple(each for each in self.problems if each.engine in ("", engine))

    @property
    def of_all(self) -> bool:
        """True if a problem is one of every engine."""
        return any(not each.engine for each in self.problems)

    @property
    def mend(self) -> str | None:
        """What `repair` makes of it; None if nothing, or for a note."""
        return None if self.severity is Severity.NOTE else MENDABLE.get(self.rule)

    @property
    def tensors(self) -> list[str]:
        """The tensors, modules, files or keys that are named, each once."""
        return list(dict.fromkeys(problem.subject for problem in self.problems))


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition that a checkpoint must meet.

    Args:
        name: name in reports.
        holds: what must hold, in one sentence.
        effect: what an engine does where it does not hold.
        next_step: what to do then.
        check: yields the places where it does not hold.
        severity: how bad a violation is.
    """

    name: str
    holds: str
    effect: str
    next_step: str
    check: Callable[[CheckpointView], Iterable[Problem]]
    severity: Severity = Severity.ERROR

    def finding(self, view: CheckpointView) -> Finding | None:
        """The finding; None if the rule holds."""
        problems = tuple(dict.fromkeys(self.check(view)))
        if not problems:
            return None
        return Finding(self.name, self.severity, problems, self.effect, self.next_step)
