"""The directory that model-free PTQ reads: finding it, and checking it and the arguments before any tensor is read."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from amaxbridge.export.output.config_and_index import fused_layers, read_config_json
from amaxbridge.export.schemes.recipe import Groups, Recipe
from amaxbridge.export.schemes.targets import EVERY_LINEAR, HEAD, is_named
from amaxbridge.mappings.errors import UsageError, listing

_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their linears are transformers' Conv1D


def check_spared(source: Path, target: Path) -> None:
    """Raises UsageError if replacing `target` would remove `source`."""
    if _lies_in(source, target):
        raise UsageError(f"output {target} would replace {source}, which is read: choose another output")


def check_apart(source: Path, target: Path) -> None:
    """Raises UsageError if writing `target` would touch `source`."""
    if _lies_in(source, target) or _lies_in(target, source):
        raise UsageError(f"output {target} and input {source} must not lie in one another: choose another output")


def _lies_in(path: Path, directory: Path) -> bool:
    """True if `path` is `directory` or inside it, also by another path, as a bind mount has one."""
    here, there = path.resolve(), directory.resolve()
    if there in (here, *here.parents):
        return True
    parents = [each for each in (here, *here.parents) if each.exists()]
    return there.exists() and any(os.path.samefile(each, there) for each in parents)


def read_config(source: Path) -> dict[str, Any]:
    """config.json of a model whose weights are `[out, in]`."""
    config = read_config_json(source)
    if config.get("model_type") in _TRANSPOSED:
        raise UsageError(
            f"{source}: {config['model_type']} stores its weights as [in, out], and engines have no quantized "
            "layers for that: choose a model of another family"
        )
    return config


def check_ignored(ignore: Sequence[str], modules: Iterable[str]) -> None:
    """Refuses `ignore` entries that match nothing: a misspelling would quantize what the user meant to keep.

    The names of fused layers, which an output's own `ignore` has beside those of their members, may be there, too.
    """
    modules = list(modules)
    modules += fused_layers(modules)
    idle = [target for target in ignore if not any(is_named(module, [target]) for module in modules)]
    if idle:
        raise UsageError(
            f"{len(idle)} entries of ignore match no module:{listing(idle)}\n"
            r"Give full names, or patterns that match from the beginning: re:.*\.gate$"
        )


def check_targets(recipe: Recipe | None, modules: Iterable[str], *, tied: bool) -> None:
    """Refuses targets that nothing can come of.

    Args:
        recipe: what is asked for; targets of its groups by name or pattern are looked at.
        modules: every module with a weight.
        tied: True if config.json says that the head is the embedding.

    Raises:
        UsageError: a target matches no module, or a tied head.
    """
    modules = list(modules)
    groups = recipe.groups if isinstance(recipe, Groups) else ()
    targets = [target for group in groups for target in group.targets if target != EVERY_LINEAR]
    heads = [target for target in targets if tied and target == HEAD]
    if heads:
        raise UsageError(
            f"{HEAD} is tied to the embedding, so no engine reads it quantized: leave it out of the targets"
        )
    idle = [target for target in targets if not any(is_named(module, [target]) for module in modules)]
    if idle:
        raise UsageError(
            f"{len(idle)} targets match no module:{listing(idle)}\n"
            r"Give full names, or patterns that match from the beginning: re:.*\.o_proj$"
        )
