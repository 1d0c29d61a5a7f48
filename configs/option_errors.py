"""Hydra's errors about the command line, in this package's words: the option, what is wrong, and the next step."""

import re
from collections.abc import Iterator

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from amaxbridge.configs.options import nearest
from amaxbridge.configs.words import WrongWord
from amaxbridge.output_options import command_line_names

REFUSED = (HydraException, OmegaConfBaseException, YAMLError, WrongWord)
"""What is raised before the command starts."""

_LISTS = "A list has brackets, and quotes around what is no plain word: \"ignore=[lm_head,'re:.*(a|b)']\""


def explained(error: BaseException, schema: type) -> str:
    """One message for what Hydra refuses on the command line of a command with this schema."""
    if isinstance(error, WrongWord):
        return str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override} is not name=value. {_LISTS}"
    if str(error).startswith("Ambiguous value"):
        word = str(error).partition("'")[2].partition("'")[0]
        return f"{word} has several values: --multirun runs a job for each. {_LISTS}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"Unknown {group}={choice}. Use one of {', '.join(error.options or ())}; --help shows all options"
    for cause in _causes(error):
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            near = nearest(str(cause.full_key), schema)
            hint = f"Did you mean {near}=? " if near else ""
            return f"Unknown option {cause.full_key}=. {hint}--help shows all options"
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if "is not a ListConfig" in str(cause):
                return f"{cause.full_key}= is a list. {_LISTS}"
            return f"{cause.full_key}=: {_first_line(cause)}. --help shows what it takes"
    if isinstance(error, YAMLError):  # of a file in --config-dir
        return f"Not YAML: {' '.join(str(error).split())}"
    return f"{_first_line(error)}. --help shows all options"


def as_typed(message: str) -> str:
    """A message of the library, which speaks of Python's arguments, in words of the command line."""
    names = command_line_names()

    def typed(found: re.Match[str]) -> str:
        return f"{names[found[1]]}={(found[2] or '').lower()}"

    return re.sub(rf"(?<![\w.])({'|'.join(names)})=(True|False)?", typed, message)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
