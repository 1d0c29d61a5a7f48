"""Attributes of Megatron, ModelOpt and torch that are replaced for as long as a context lasts, and announced once.

Nothing outside `patched` assigns to a module or class that is not ours: whoever lives in the same process finds it as
it was once the context has ended, by an exception or not.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

_log = logging.getLogger("amaxbridge")


@dataclass(frozen=True, slots=True)
class Patch:
    """An attribute of a module or class, and what it is inside the context."""

    owner: Any
    name: str
    value: Any


@contextlib.contextmanager
def patched(*patches: Patch, why: str | None = None) -> Iterator[None]:
    """Puts patches in place, and takes them back at the end. Contexts may be nested.

    Args:
        why: what is replaced, and for what reason: logged when it happens first in this process. None where nobody
            need know.
    """
    if why is not None:
        announce(why)
    with contextlib.ExitStack() as undo:
        for patch in patches:
            undo.callback(_restore, patch.owner, patch.name, vars(patch.owner).get(patch.name, _INHERITED))
            setattr(patch.owner, patch.name, patch.value)
        yield


@cache
def announce(message: str, level: int = logging.INFO) -> None:
    """Logs a message, once in this process."""
    _log.log(level, "%s", message)


_INHERITED = object()


def _restore(owner: Any, name: str, original: Any) -> None:
    if original is _INHERITED:
        delattr(owner, name)
    else:
        setattr(owner, name, original)
