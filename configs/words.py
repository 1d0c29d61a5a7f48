"""The words of a command line: made ready for Hydra, and made ready to be typed again.

Hydra has a grammar for values: commas separate, brackets make lists, `12e4` is a number. An option that is text here (a
path, a name, a revision) is taken as it stands instead, so that no path needs quoting twice; `${…}` still refers to
other options. In a sweep (`--multirun`) commas separate its values.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from amaxbridge.configs.options import choices_of, nearest, options_of

_FLAGS: Mapping[str, bool] = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--multirun", "-m", "--run", "-r"), False),
    **dict.fromkeys(("--resolve", "--shell-completion", "-sc"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-path", "-cp"), True),
    **dict.fromkeys(("--config-name", "-cn", "--info", "-i"), True),
}
"""Flags of Hydra → True if a value follows. Not among them is one that runs a pickle."""

_SWEEP = ("--multirun", "-m", "hydra.mode=MULTIRUN")
_SOURCES = ("checkpoint", "input", "hf")
_TEXT = (str, str | None)


class WrongWord(Exception):
    """A word that is no option; the message says what to type."""


def for_hydra(words: Sequence[str], schema: type) -> list[str]:
    """The words for Hydra's parser: flags first, since it takes none between options, text quoted.

    `+name=` and `++name=` are `name=`: every option is known, so there is none to add.

    Args:
        schema: the options of the command.

    Raises:
        WrongWord: an unknown flag, a word that is not `name=value`, or empty text.
    """
    text = {name for name, field in options_of(schema) if field.type in _TEXT}
    sweeps = _sweeps(words)
    flags, options = [], []
    for word, is_option in _sorted_out(words, schema):
        if not is_option:
            flags.append(word)
            continue
        name, _, value = word.partition("=")
        if not name.startswith("+hydra"):
            name = name.lstrip("+")
        if name in text and not value:
            raise WrongWord(f"{name}= is empty: give a value, or leave it out")
        value = os.path.expanduser(value)  # `output=~/out`, which only some shells do
        is_sweep = sweeps and ("," in value or re.fullmatch(r"\w+\(.*\)", value))
        options.append(f"{name}={_quoted(value) if name in text and not is_sweep else value}")
    return [*flags, *options]


def sweep_record(words: Sequence[str], directory: str) -> list[str]:
    """The words that send a sweep's record, which Hydra always writes, to `directory` if they name no other."""
    named = any(word.startswith("hydra.sweep.dir=") for word in words)
    return [f"hydra.sweep.dir={directory}"] if _sweeps(words) and not named else []


def typed_again(words: Iterable[str]) -> list[str]:
    """Words that Hydra has read, as a user would type them."""
    return [re.sub(r"(?<==)(['\"])(.*)\1$", lambda found: _unquoted(found[2], found[1]), word) for word in words]


def flags_of(words: Sequence[str]) -> list[str]:
    """The flags among the words, with their values, but for that of a sweep."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        if (word in _FLAGS and word not in _SWEEP) or _FLAGS.get(before):
            found.append(word)
    return found


def _sweeps(words: Iterable[str]) -> bool:
    return any(word in _SWEEP for word in words)


def _sorted_out(words: Sequence[str], schema: type) -> Iterator[tuple[str, bool]]:
    """Each word, and True if it is an option."""
    options = dict(options_of(schema))
    for before, word in zip(["", *words], words, strict=False):
        if _FLAGS.get(before):
            yield word, False
        elif word.startswith("-"):
            flag, _, value = word.partition("=")
            if flag not in _FLAGS:
                name = flag.lstrip("-").replace("-", "_")
                meant = name if name in options else nearest(name, schema)
                hint = f": {meant}={value or '…'}" if meant else "; --help shows all"
                raise WrongWord(f"Unknown flag {flag}. Options have no dashes{hint}")
            yield word, False
        elif "=" in word[1:] or word.startswith("~"):
            yield word, True
        else:
            raise WrongWord(f"{word} is not name=value. {_meant(word, before, options)}--help shows all options")


def _meant(word: str, before: str, options: Iterable[str]) -> str:
    """What a word without a name may have been meant for, as a sentence."""
    names = [name for name in options if word in choices_of(name)]
    if not names and os.path.exists(word):
        names = [name for name in options if name in _SOURCES]
    if names:
        return f"Did you mean {names[0]}={word}? "
    return f"A value with spaces is quoted: '{before} {word}'. " if "=" in before else ""


def _quoted(value: str) -> str:
    """Text that Hydra reads as it stands. None stays none, and what is quoted already stays so."""
    if value == "null" or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _unquoted(text: str, quote: str) -> str:
    return re.sub(rf"(\\*)(\\{quote}|$)", lambda found: "\\" * (len(found[1]) // 2) + found[2][1:], text)
