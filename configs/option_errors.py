"""Hydra's errors about the command line, in this package's words: the option, what is wrong, and the next step."""

import difflib
from collections.abc import Iterator

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from amaxbridge.configs.options import options_of

REFUSED = (HydraException, OmegaConfBaseException, YAMLError)
"""What Hydra raises before the command starts."""

_QUOTED = "A value with commas, = or brackets is quoted twice: 'hf=\"/models/run=3\"'"


def explained(error: BaseException, schema: type) -> str:
    """One message for what Hydra refuses on the command line of a command with this schema."""
    if isinstance(error, OverrideParseException):
        return f"{error.override} is not name=value. {_QUOTED}"
    if str(error).startswith("Ambiguous value"):
        return f"{_first_line(error)}. {_QUOTED}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"Unknown {group}={choice}. Use one of {', '.join(error.options or ())}; --help shows all options"
    for cause in _causes(error):
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return f"Unknown option {cause.full_key}=. {_nearest(str(cause.full_key), schema)}--help shows all options"
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return f"{cause.full_key}=: {_first_line(cause)}. --help shows what it takes"
    if isinstance(error, YAMLError):  # of a file in --config-dir
        return f"Not YAML: {' '.join(str(error).split())}"
    return f"{_first_line(error)}. --help shows all options"


def _nearest(name: str, schema: type) -> str:
    """By the part after the last dot: an option of a group is often given without its group."""
    options = {known.rpartition(".")[2]: known for known, _ in reversed(list(options_of(schema)))}
    near = difflib.get_close_matches(name.rpartition(".")[2], options, n=1)
    return f"Did you mean {options[near[0]]}=? " if near else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
