"""Ranks and frameworks: live Megatron models on one side, Hugging Face checkpoints on the other.

The public names come from their modules when they are asked for: commands that need a small part of the room wait for
that part alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amaxbridge.bridge.auto import AutoBridge
    from amaxbridge.bridge.save import ExportReport

__all__ = ["AutoBridge", "ExportReport"]

_PLACES = {"AutoBridge": "auto", "ExportReport": "save"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
