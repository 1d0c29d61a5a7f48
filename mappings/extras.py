"""Packages that only some commands need, the extra that installs each, and the one error where it is absent."""

from collections.abc import Mapping
from importlib.util import find_spec

from amaxbridge.mappings.errors import UsageError

EXTRAS: Mapping[str, tuple[str, ...]] = {  # extra, as in pyproject.toml → the modules that it brings
    "megatron": ("megatron.core", "modelopt", "transformers", "tokenizers", "einops", "requests"),
    "convert": ("compressed_tensors",),
    "report": ("jinja2",),
}


class MissingExtraError(UsageError, ImportError):
    """A package that an extra installs is not there."""


def installed(module: str) -> bool:
    """True if a module can be imported. It is not, nor are the frameworks above it: they take seconds."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


def need(what: str, *modules: str) -> None:
    """Checks that what is about to be imported is installed. Call it before an import of any module in `EXTRAS`.

    Args:
        what: what the modules are needed for, to begin a sentence with.

    Raises:
        MissingExtraError: some are not; names them and their extras.
    """
    absent = [module for module in modules if not installed(module)]
    if absent:
        extras = ",".join(extra for extra, brought in EXTRAS.items() if set(brought) & set(absent))
        raise MissingExtraError(
            f"{what} needs {', '.join(absent)}, not installed here: pip install 'amaxbridge[{extras}]'"
        )
