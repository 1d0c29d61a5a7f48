"""Replaces attributes of Megatron, ModelOpt and torch while a context lasts, and announces it once.

Nothing outside `patched` assigns to a foreign module or class. When the context ends, even by an exception, other code
in the process finds the original.
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
    """An attribute of a module or class, and its value inside the context."""

    owner: Any
    name: str
    value: Any


@contextlib.contextmanager
def patched(*patches: Patch, why: str | None = None) -> Iterator[None]:
    """Applies patches, and undoes them at the end. Contexts may be nested.

    Args:
        why: what is replaced and why, logged the first time in this process. None to log nothing.
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
