"""A family of a user's own, from a Python file: `family=FILE.py` on the command line, `family=` in Python.

The file sets `FAMILY`, a `ModelFamily` like those in `families/`. It runs as `python FILE.py` would, and the directory
that it lies in is appended to `sys.path`, so it may import its neighbours. Only a user names such a file; nothing in a
checkpoint or a Hugging Face directory does.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from amaxbridge.mappings.errors import AmaxbridgeError, UsageError
from amaxbridge.mappings.families import FAMILIES, family_of
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.mapping import MegatronParamMapping

type FamilySource = str | Path | ModelFamily

_NAME = "FAMILY"
_HOW = "see docs/custom-models.md"


def find_family(source: FamilySource | None, hf_config: Mapping[str, Any]) -> ModelFamily:
    """The family of a Hugging Face config: the user's own if there is one, else the one that is known.

    Raises:
        UnknownArchitectureError: no family is known.
        UsageError: the user's file is none, or its family is of other architectures.
    """
    if source is None:
        return family_of(hf_config)
    family, names = own_family(source), hf_config.get("architectures") or []
    if not set(names) & set(family.architectures):
        raise UsageError(
            f"{family.file} is a family of {', '.join(family.architectures)}, but config.json has architectures "
            f"{', '.join(map(str, names)) or '(none)'}: correct one of them"
        )
    return family


def own_family(source: FamilySource) -> ModelFamily:
    """A user's own family, with its `file`.

    Args:
        source: the file, or the family itself.

    Raises:
        UsageError: there is no such file, it cannot be run, it has no family, or the family is not a whole one. The
            message says where and why.
    """
    if isinstance(source, ModelFamily):
        return _checked(source, source.file or "the family given")
    file = Path(source).expanduser()
    return _checked(_found_in(_run(file), file), str(file))


def _run(file: Path) -> ModuleType:
    """The module that a file makes. Bytecode is not kept: the file's directory need not be writable."""
    try:
        text = file.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"family={file} cannot be read ({why}): give a Python file with {_NAME}; {_HOW}") from error
    module = ModuleType(f"_amaxbridge_family_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses of the file look for their names
    beside = str(file.parent.resolve())
    if beside not in sys.path:
        sys.path.append(beside)  # last, so that no file beside it takes the place of an installed package
    with _naming(str(file)):
        exec(compile(text, str(file), "exec"), module.__dict__)
    return module


def _found_in(module: ModuleType, file: Path) -> ModelFamily:
    family = getattr(module, _NAME, None)
    if isinstance(family, ModelFamily):
        return family
    others = [name for name, value in vars(module).items() if isinstance(value, ModelFamily)]
    if hasattr(module, _NAME):
        raise UsageError(f"{file}: {_NAME} is a {type(family).__name__}, not a ModelFamily; {_HOW}")
    hint = f" ({', '.join(others)} {'is one' if len(others) == 1 else 'are some'})" if others else ""
    raise UsageError(f"{file} sets no {_NAME}: name the ModelFamily there so{hint}; {_HOW}")


def _checked(family: ModelFamily, file: str) -> ModelFamily:
    """The family, if it is whole, and claims nothing that another family does."""
    names, mappings = family.architectures, family.mappings
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"{file}: architectures is {names!r}, not a tuple of names, as in ('MyModelForCausalLM',)")
    wrong = [each for each in mappings if not isinstance(each, MegatronParamMapping)]
    if wrong or not mappings:
        shown = ", ".join(repr(each)[:60] for each in wrong[:3]) or "none"
        raise UsageError(f"{file}: mappings must be mappings of weights; {shown} found. A group is added with a star")
    known = [name for name in names for each in FAMILIES if name in each.architectures]
    if known:
        raise UsageError(
            f"{file} claims {', '.join(known)}, whose family is known here. Give your model an architecture of its "
            "own, in the file and in config.json"
        )
    own = replace(family, file=file)
    with _naming(file):
        own.registry  # noqa: B018  # built here, so that overlaps are found before anything else
    return own


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Turns whatever a user's file raises into a UsageError with the file and the line."""
    try:
        yield
    except SyntaxError as error:
        where = f"{error.filename or file}, line {error.lineno}"
        text = f": {error.text.strip()}" if error.text else ""
        raise UsageError(f"{where}: {error.msg}{text}") from error
    except AmaxbridgeError as error:
        raise UsageError(f"{file}: {error}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
        where = f"{file}, line {lines[-1]}" if lines else file
        raise UsageError(f"{where}: {type(error).__name__}: {error}") from error


def judge(family: ModelFamily, hf_config: Mapping[str, Any]) -> None:
    """Reads a model through every table of a user's own family once, so that mistakes show before work begins.

    Raises:
        UsageError: a table raises something else than an error of ours, or the config lacks a field.
    """
    if family.file is None:
        return
    with _naming(family.file):
        family.registry_for(hf_config)
        family.model_config(hf_config)
        family.layer_pattern(hf_config)
        family.model_arguments(hf_config)
        family.layer_settings(hf_config)
        with suppress(UsageError):  # a model that can only be exported
            family.transformer_config(hf_config)
