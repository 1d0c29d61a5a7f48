"""The architecture of a checkpoint that is quantized without a model: known, named by the user, or guessed."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from amaxbridge.export.architectures.facts import KNOWN, Architecture, Guess, architecture_of
from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.output.provenance import GUESS
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.names import kind_of


def knowledge_of(config: Mapping[str, Any], asked: str | None) -> Architecture | Guess:
    """What is known of a model: by its config.json, or as the user says.

    Raises:
        UsageError: the user names an architecture that is not known.
    """
    if asked == GUESS:
        return Guess(_tied_head(config))
    found = architecture_of(config if asked is None else {**config, "architectures": [asked]})
    if found is None and asked is not None:
        raise UsageError(f"architecture={asked} is not known{_nearest(asked)}: give a known one, or {GUESS}")
    return found or Guess(_tied_head(config))


def unknown_architecture(config: Mapping[str, Any], source: Path, guessed: Finalizer) -> str:
    """The error for a model of an unknown architecture: what would have been guessed of it."""
    named = [str(name) for name in config.get("architectures") or ()]
    kinds = {"would be quantized": guessed.quantized, "would stay unquantized": guessed.left}
    lists = "".join(
        f"\n{len(modules)} modules {what}:{listing(sorted({kind_of(module) for module in modules}))}"
        for what, modules in kinds.items()
    )
    says = (
        f"the architecture {', '.join(named)}, which is not known{_nearest(named[0])}" if named else "no architecture"
    )
    return (
        f"{source}: config.json names {says}. By the names that most models use,{lists}\n"
        f"If this is right, give architecture={GUESS}; if the model has the tensors of a known one, its name"
    )


def noted(knowledge: Architecture | Guess, config: Mapping[str, Any]) -> dict[str, Any]:
    """What amaxbridge.json and the model card say of a guess; nothing if there was none."""
    if isinstance(knowledge, Architecture):
        return {}
    named = ", ".join(map(str, config.get("architectures") or ["no architecture"]))
    return {
        "architecture": GUESS,
        "notes": [f"What the tensors of {named} are was guessed by their names (architecture={GUESS})."],
    }


def _tied_head(config: Mapping[str, Any]) -> str | None:
    return "lm_head" if config.get("tie_word_embeddings") else None


def _nearest(name: str) -> str:
    near = get_close_matches(
        name, sorted({file.name.partition(".")[0] for file in KNOWN.glob("*.json")}), n=3, cutoff=0.4
    )
    return f" (near it: {', '.join(near)})" if near else ""
