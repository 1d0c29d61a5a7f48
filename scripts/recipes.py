"""From the options of a command to what an export takes: keywords, and the recipe."""

from dataclasses import asdict

from amaxbridge import cli
from amaxbridge.configs.schema import ExportConfig, QuantizeConfig, SchemeConfig
from amaxbridge.export.progress import Progress
from amaxbridge.export.schemes import (
    SCHEMES,
    Groups,
    Recipe,
    SchemeGroup,
    from_quantizers,
    has_group_size,
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
        UsageError: a scheme or group size is unknown, no group takes the group size, or there are groups beside
            `from_quantizers`.
    """
    ignored = tuple(config.ignore)
    if config.from_quantizers:
        if config.groups or config.group_size is not None:
            option = "scheme.groups" if config.groups else "scheme.group_size"
            raise UsageError(f"scheme.from_quantizers=true takes no {option}: the quantizers decide all schemes")
        return from_quantizers(ignored)
    takes_size = [each for each in config.groups if each.group_size is None and has_group_size(each.scheme)]
    if config.group_size is not None and not takes_size:
        sized = [name for name, scheme in SCHEMES.items() if scheme.group_sizes]
        raise UsageError(
            f"scheme.group_size={config.group_size} is for {', '.join(sized)}, and no group of the scheme is one of "
            "them without a group_size of its own"
        )
    if not config.groups:
        return None
    sizes = [config.group_size if each in takes_size else each.group_size for each in config.groups]
    groups = (
        SchemeGroup(named_scheme(each.scheme, size), tuple(each.targets))
        for each, size in zip(config.groups, sizes, strict=True)
    )
    return Groups(tuple(groups), ignored)
