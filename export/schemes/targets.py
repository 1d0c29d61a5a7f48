"""The one matcher of targets and `ignore` entries, for recipes, config.json and engines.

A target is a module's full name, `re:` and a pattern that matches from the beginning of its name, or `Linear`, the
class of every linear layer. A part of a name never matches: `layers.1` is not `layers.10`.
"""

from collections.abc import Collection, Iterable
from functools import lru_cache

from amaxbridge.export.schemes.linear_pattern import LinearPattern, UnsupportedPattern
from amaxbridge.mappings.errors import UsageError, listing

EVERY_LINEAR = "Linear"
EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte")
HEAD = "lm_head"
_PATTERN = "re:"


def means(target: str, module: str) -> bool:
    """True if a target is the module's full name, or a pattern that matches from its beginning.

    A pattern that is refused matches nothing; see `is_sound`.
    """
    if not target.startswith(_PATTERN):
        return target == module
    compiled = _compiled(target)
    return compiled is not None and compiled.matches(module)


def is_named(module: str, targets: Iterable[str]) -> bool:
    """True if a target means the module by its name."""
    return any(means(target, module) for target in targets)


def is_targeted(module: str, targets: Collection[str]) -> bool:
    """True if a target means the module by its name, or `Linear` means it: every module but the embeddings."""
    return is_named(module, targets) or (EVERY_LINEAR in targets and not module.endswith(EMBEDDINGS))


def is_pattern(target: str) -> bool:
    """True if a target is a pattern."""
    return target.startswith(_PATTERN)


def is_sound(target: str) -> bool:
    """True if a target is a name or a class, or a pattern that `linear_pattern` takes."""
    return not is_pattern(target) or _compiled(target) is not None


def check_sound(targets: Iterable[str]) -> None:
    """Raises UsageError if patterns are refused; all are named."""
    broken = [target for target in targets if not is_sound(target)]
    if broken:
        raise UsageError(f"{len(broken)} targets are not valid regular expressions:{listing(broken)}\nCorrect them")


@lru_cache(maxsize=4096)
def _compiled(target: str) -> LinearPattern | None:
    try:
        return LinearPattern(target.removeprefix(_PATTERN))
    except UnsupportedPattern:
        return None
