"""JSON from an untrusted file, read once into values that the rest of the program can use without a second look.

Python's parser takes more than JSON has, and some of what it returns fails far from the file that is to blame: of two
equal keys it keeps one without a word, `1e999` becomes an infinity, half of a surrogate pair cannot be written, and a
list of a thousand levels ends every recursive function. All of these are refused here.

The one liberty is NaN and Infinity, which published config.json files have (`time_step_limit` of Mamba models). They
are read as transformers spells them in strict JSON, `{"__float__": "Infinity"}`, and written so.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amaxbridge.export.disk.input_files import read_input
from amaxbridge.mappings.errors import CheckpointError

_MOST_LEVELS = 64


class NotStrictJson(ValueError):
    """Bytes that are not an object in strict JSON; the message completes "the file is not valid JSON: …"."""


def read_json_object(file: Path) -> dict[str, Any] | None:
    """The object in a file of an input; None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, holds no object in strict JSON, or is a link out of its directory.
    """
    content = read_input(file, file.parent)
    if content is None:
        return None
    try:
        return parse_json_object(content)
    except NotStrictJson as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. Download or export it again") from error


def parse_json_object(text: bytes | str) -> dict[str, Any]:
    """The object in a text, UTF-8 if it is bytes.

    Raises:
        NotStrictJson: it is not JSON, not an object, has a key twice, or more than 64 levels.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_spelled,
            parse_float=_finite,
        )
    except NotStrictJson:
        raise
    except ValueError as error:
        raise NotStrictJson(str(error)) from error
    except RecursionError:
        raise NotStrictJson(f"more than {_MOST_LEVELS} levels") from None
    if not isinstance(value, dict):
        raise NotStrictJson(f"it holds a {type(value).__name__}, not an object")
    _check(value)
    return value


type Form = Any
"""What a value must be: `str`, `bool`, `int`, `float` (any finite number), None; `[form]`, a list; `{str: form}`, an
object with any keys; `{"key": form}`, an object with these keys; a tuple of forms, one of them. A key whose form is a
tuple with None may be absent."""


def misfit(value: Any, form: Form, where: str = "") -> str | None:
    """What is wrong with a value, as "amax.divergent is none of …"; None if it has the form. Other keys are ignored."""
    match form:
        case tuple():
            if all(misfit(value, each) for each in form):
                return f"{where} is {_shown(value)}"
        case list():
            if not isinstance(value, list):
                return f"{where} is {_shown(value)}, not a list"
            return next((found for each in value if (found := misfit(each, form[0], f"{where}[…]"))), None)
        case dict():
            if not isinstance(value, dict):
                return f"{where} is {_shown(value)}, not an object"
            pairs = [(key, form[str]) for key in value] if str in form else form.items()
            inside = (misfit(value.get(key), each, f"{where}.{key[:80]}".lstrip(".")) for key, each in pairs)
            return next(filter(None, inside), None)
        case _:
            kinds = (int, float) if form is float else (form or type(None),)
            if type(value) not in kinds:
                return f"{where} is {_shown(value)}"
    return None


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise NotStrictJson(f"the key {twice[:200]!r} is there twice")
    return made


def _spelled(constant: str) -> Mapping[str, str]:
    """NaN, Infinity or -Infinity, in transformers' spelling."""
    return {"__float__": constant}


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise NotStrictJson(f"the number {text[:40]} is too large")
    return value


def _check(whole: dict[str, Any]) -> None:
    """Refuses deep nesting and strings that UTF-8 cannot hold, level by level: no recursion."""
    level: list[Any] = [whole]
    for _ in range(_MOST_LEVELS):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and not each.isascii():
                _check_text(each)
        if not inner:
            return
        level = inner
    raise NotStrictJson(f"more than {_MOST_LEVELS} levels")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotStrictJson(f"the string {text[:40]!r} holds half of a surrogate pair") from None
