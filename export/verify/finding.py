"""Rules and what they find.

A rule is a declaration: what must hold, a check, and what a serving engine does where it does not hold. The check only
names tensors and says what is wrong with each; the rest is the same for all of them and stands once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from amaxbridge.export.verify.checkpoint_view import CheckpointView


class Severity(StrEnum):
    """Errors make a checkpoint unfit to serve; warnings are for people to judge; notes are good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Problem(NamedTuple):
    """A tensor, module, file or key, and what is wrong with it."""

    subject: str
    what: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that a checkpoint breaks, with every place where it does.

    Args:
        rule: its name.
        effect: what happens in a serving engine.
        next_step: what to do about it.
    """

    rule: str
    severity: Severity
    problems: tuple[Problem, ...]
    effect: str
    next_step: str

    @property
    def tensors(self) -> list[str]:
        """What is named: tensors, modules, files or keys, each once."""
        return list(dict.fromkeys(problem.subject for problem in self.problems))


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that must hold of a checkpoint.

    Args:
        name: as reports call it.
        holds: what must hold, in one sentence.
        effect: what an engine does where it does not.
        next_step: what to do then.
        check: gives the places where it does not hold.
    """

    name: str
    holds: str
    effect: str
    next_step: str
    check: Callable[[CheckpointView], Iterable[Problem]]
    severity: Severity = Severity.ERROR

    def finding(self, view: CheckpointView) -> Finding | None:
        """What the rule finds, None where it holds."""
        problems = tuple(dict.fromkeys(self.check(view)))
        if not problems:
            return None
        return Finding(self.name, self.severity, problems, self.effect, self.next_step)
