"""Packages that only some commands need, the extra that installs each, and the error if one is missing."""

from collections.abc import Mapping
from importlib.util import find_spec

from amaxbridge.mappings.errors import UsageError

EXTRAS: Mapping[str, tuple[str, ...]] = {  # extra, as in pyproject.toml → the modules that it brings
    "megatron": ("megatron.core", "modelopt", "transformers", "tokenizers", "einops", "requests"),
    "convert": ("compressed_tensors",),
    "report": ("jinja2",),
}


class MissingExtraError(UsageError, ImportError):
    """A package that an extra installs is missing."""


def installed(module: str) -> bool:
    """True if a module can be imported. Nothing is imported to find out, because frameworks take seconds."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def need(what: str, *modules: str) -> None:
    """Checks that modules are installed. Call it before importing any module in `EXTRAS`.

    Args:
        what: what needs the modules, as the beginning of a sentence.

    Raises:
        MissingExtraError: some are missing. The message names them and their extras.
    """
    absent = [module for module in modules if not installed(module)]
    if absent:
        extras = ",".join(extra for extra, brought in EXTRAS.items() if set(brought) & set(absent))
        raise MissingExtraError(
            f"{what} needs {', '.join(absent)}, not installed here: pip install 'amaxbridge[{extras}]'"
        )
