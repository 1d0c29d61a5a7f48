"""Declaring an option, and making the help text from the declarations.

An option is a field of a dataclass: type, default and meaning. `--help` shows these meanings, so they are stated once.
Options that Python takes, too, are declared in `amaxbridge.output_options`. `$CONFIG` in the text is Hydra's: the
values under the given options.
"""

import dataclasses
import difflib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from amaxbridge.output_options import MEANING, declared

_DIRECTORY = Path(__file__).parent
_WIDTH = 110


def option(meaning: str, default: Any = MISSING) -> Any:
    """A field with its meaning. Without a default it is required; a list or dataclass default is made anew."""
    metadata = {MEANING: meaning}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def shared(name: str, group: type | None = None) -> Any:
    """A field for an option that Python takes, too, with its meaning, and its default or a group of options."""
    found = declared(name)
    default = list(found.default) if isinstance(found.default, tuple) else found.default
    return option(found.metadata[MEANING], group or default)


def options_of(schema: type, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Every option of a command by its command-line name, a group before its members."""
    for each in dataclasses.fields(schema):
        yield prefix + each.name, each
        if isinstance(each.type, type) and dataclasses.is_dataclass(each.type):
            yield from options_of(each.type, f"{prefix}{each.name}.")


def choices_of(group: str) -> list[str]:
    """The names that `group=NAME` takes, without those of `--config-dir`."""
    return sorted(path.stem for path in (_DIRECTORY / group).glob("*.yaml"))


def nearest(name: str, schema: type) -> str | None:
    """The option whose name is most like this one; None if none is.

    By the part after the last dot: an option of a group is often given without its group.
    """
    options = {known.rpartition(".")[2]: known for known, _ in reversed(list(options_of(schema)))}
    near = difflib.get_close_matches(name.rpartition(".")[2], options, n=1)
    return options[near[0]] if near else None


def help_template(schema: type) -> str:
    """The text of `--help`, for Hydra to fill in."""
    rows = [(name, each.metadata[MEANING], choices_of(name)) for name, each in options_of(schema)]
    rows.sort(key=lambda row: row[0] == "debug")  # every command has it: last
    column = max(len(name) for name, _, _ in rows) + 2
    lines = [(schema.__doc__ or "").strip(), "", "Options, each as name=value:", ""]
    for name, meaning, choices in rows:
        text = f"{meaning} One of: {', '.join(choices)}." if choices else meaning
        indent = " " * (column + 2)
        lines += textwrap.wrap(text, _WIDTH, initial_indent=f"  {name:<{column}}", subsequent_indent=indent)
    more = "--cfg job shows only these values; --config-dir DIR adds choices of your own: DIR/scheme/mine.yaml."
    return "\n".join([*lines, "", "Default values (??? must be given):", "", "$CONFIG", "", more, ""])
