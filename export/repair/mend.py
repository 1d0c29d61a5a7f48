"""What a mend is: one kind of thing that is wrong, and what a repair does about it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from amaxbridge.export.repair.edits import Found
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.mappings.errors import UsageError


class Unseen(StrEnum):
    """What to do about an expert without a usable input scale, which saw no token in calibration."""

    ERROR = "error"
    LAYER_MAX = "layer_max"


@dataclass(frozen=True, slots=True)
class Mend:
    """A mend.

    Args:
        name: name in reports.
        rules: the rules of `verify` that find what it mends.
        wrong: what is wrong, in one sentence.
        changes: what it changes, and what it refuses.
        find: yields each change, and each thing that it must leave.
    """

    name: str
    rules: tuple[str, ...]
    wrong: str
    changes: str
    find: Callable[[MendedView, Unseen], Iterable[Found]]


def unseen_policy(name: str) -> Unseen:
    """The policy with this name.

    Raises:
        UsageError: there is none.
    """
    if name not in list(Unseen):
        raise UsageError(f"unknown unseen={name}: use {', '.join(Unseen)}")
    return Unseen(name)
