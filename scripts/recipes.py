"""From the options of a command to what an export takes: keywords, and the recipe."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import MappingProxyType

from amaxbridge import cli
from amaxbridge.configs.schema import ExportConfig, QuantizeConfig, SchemeConfig, SchemeGroupConfig
from amaxbridge.export.progress import Progress
from amaxbridge.export.schemes import (
    SCHEMES,
    Groups,
    Recipe,
    SchemeGroup,
    from_quantizers,
    has_group_size,
    has_scales,
    named_scheme,
)
from amaxbridge.mappings.errors import UsageError
from amaxbridge.output_options import OutputKeywords


def output_keywords(
    options: ExportConfig | QuantizeConfig, command: str, progress: Progress | None = None
) -> OutputKeywords:
    """What every export takes, from the options of a command; they are kept as its record."""
    return {
        "format": options.format,
        "base_model": options.base_model,
        "missing_amax": options.amax.missing,
        "mixed_groups": options.mixed_groups,
        "nonfinite": options.nonfinite,
        "overwrite": options.io.overwrite,
        "hash_source": options.io.hash_source,
        "dry_run": options.dry_run,
        "verify": options.verify,
        "progress": progress,
        "record": {"command": command, "command_line": cli.command_line(command), "options": asdict(options)},
    }


def recipe_of(config: SchemeConfig) -> Recipe | None:
    """The recipe of a configuration; None for plain weights.

    Raises:
        UsageError: a scheme, a group size or scales are unknown, no group takes what is given for all of them, or there
            are groups beside `from_quantizers`.
    """
    ignored = tuple(config.ignore)
    given = {option: value for option in _TAKES if (value := getattr(config, option)) is not None}
    if config.from_quantizers:
        if config.groups or given:
            option = "groups" if config.groups else next(iter(given))
            raise UsageError(f"scheme.from_quantizers=true takes no scheme.{option}: the quantizers decide all schemes")
        return from_quantizers(ignored)
    for option, value in given.items():
        if not any(_takes(group, option) for group in config.groups):
            raise UsageError(
                f"scheme.{option}={value} is for {', '.join(filter(_TAKES[option], SCHEMES))}, and no group of the "
                f"scheme is one of them without a {option} of its own"
            )
    if not config.groups:
        return None
    groups = []
    for group in config.groups:
        options = {option: given.get(option) if _takes(group, option) else getattr(group, option) for option in _TAKES}
        groups.append(SchemeGroup(named_scheme(group.scheme, **options), tuple(group.targets)))
    return Groups(tuple(groups), ignored)


_TAKES: Mapping[str, Callable[[str], bool]] = MappingProxyType({"group_size": has_group_size, "scales": has_scales})
"""Options for all groups of a recipe → which schemes take it."""


def _takes(group: SchemeGroupConfig, option: str) -> bool:
    return getattr(group, option) is None and _TAKES[option](group.scheme)
