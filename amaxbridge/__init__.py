"""Megatron-Core models with ModelOpt quantizers to Hugging Face compressed-tensors checkpoints, and back.

The folders at the top of the repository are the sub-packages of this one: links here make them so for the interpreter,
for type checkers and for editors alike, and a wheel holds the files themselves. The public names are imported when they
are asked for, since torch takes a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amaxbridge.bridge.auto import AutoBridge
    from amaxbridge.export.model_free.whole_directory import model_free_ptq
    from amaxbridge.export.repair import repair
    from amaxbridge.export.verify import verify

    __version__: str

__all__ = ["AutoBridge", "__version__", "model_free_ptq", "repair", "verify"]

_PLACES = {
    "AutoBridge": "amaxbridge.bridge.auto",
    "model_free_ptq": "amaxbridge.export.model_free.whole_directory",
    "repair": "amaxbridge.export.repair",
    "verify": "amaxbridge.export.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("amaxbridge.build_version").build_version()
    if name not in _PLACES:
        raise AttributeError(f"module 'amaxbridge' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
