"""The model that the arguments saved in a Megatron checkpoint describe, where no Hugging Face directory does.

Every family is asked: its tables are read from Megatron to Hugging Face, transformers fills in its defaults, and the
result is read back. The family is the model's where that gives every setting that was saved, and Megatron's default of
every other: nothing is exported as something else. Where several fit, the tensors decide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from amaxbridge.bridge.hf import HFModel, make_hf_model
from amaxbridge.bridge.stored.identification import check_kind, identify, stored_model, tensor_disagreements
from amaxbridge.bridge.stored.saved_arguments import read_arguments
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.mappings.errors import AmaxbridgeError, UsageError, listing
from amaxbridge.mappings.families import FAMILIES, family_of
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.megatron_settings import DEFAULTS, Settings, argument, differences, from_arguments, in_use

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A family that was asked: the model, or what speaks against it."""

    family: ModelFamily
    hf: HFModel | None
    problems: Sequence[str]


def model_of_arguments(checkpoint: Path, *, architecture: str | None = None, vocab_size: int | None = None) -> HFModel:
    """The model of a checkpoint; `AutoBridge.from_megatron_checkpoint` documents arguments and errors."""
    opened = DistCheckpoint(checkpoint)
    check_kind(opened)
    arguments, embedding = read_arguments(opened), opened.tensors.get(_EMBEDDING)
    if arguments is None or embedding is None:
        raise UsageError(f"hf= is required for config.json, or a checkpoint with arguments: {identify(checkpoint)}")
    settings = from_arguments(arguments)
    size = vocab_size or settings.get("vocab_size")
    settings["vocab_size"] = size or embedding.shape[0]
    families = FAMILIES if architecture is None else [family_of({"architectures": [architecture]})]
    families = [family for family in families if not family.carried]
    if not families:
        raise UsageError(f"{architecture} has parts that are not in a Megatron checkpoint: give its hf= with weights")
    attempts = [_attempt(family, settings, embedding.dtype, padded=size is None) for family in families]
    fitting = [attempt.hf for attempt in attempts if attempt.hf is not None]
    if len(_kinds(fitting)) > 1:
        fitting = [hf for hf in fitting if not tensor_disagreements(stored_model(opened, hf), hf)] or fitting
    if not fitting:
        raise UsageError(_nothing_fits(opened.directory, attempts))
    if len(_kinds(fitting)) > 1:
        names = ", ".join(_kinds(fitting))
        raise UsageError(f"the arguments saved in {opened.directory} fit {names}: choose one with architecture=")
    return fitting[0]


def _kinds(models: Sequence[HFModel]) -> list[str]:
    """An architecture for each kind: models of equal settings and the same mappings compute the same."""
    return list({id(hf.family.mappings): hf.family.architectures[0] for hf in models}.values())


def _attempt(family: ModelFamily, found: Settings, dtype: torch.dtype, *, padded: bool) -> _Attempt:
    filled = {**DEFAULTS, **found}
    unlike = [f"{argument(name)}: {filled[name]}" for name, value in family.constants.items() if filled[name] != value]
    try:
        settings = family.settings_of(found)
        filled = {**DEFAULTS, **settings}
        tables = {**family.transformer, **family.model, **family.layers}
        missing = [name for name in tables if filled.get(name) is None and DEFAULTS.get(name, "none") is not None]
        if missing:
            return _Attempt(family, None, [*(f"{argument(name)} is not among them" for name in missing), *unlike])
        hf = make_hf_model(family.architectures[0], family.hf_config(filled), dtype)
        expected = family.settings(hf.config)
    except AmaxbridgeError as error:
        return _Attempt(family, None, [str(error), *unlike])
    ours, theirs = in_use(filled), in_use(expected)
    problems = [
        f"{argument(name)}: {ours.get(name)}, and the family has {theirs.get(name)}"
        for name in differences(filled, expected)
    ]
    if problems:
        return _Attempt(family, None, problems)
    return _Attempt(family, replace(hf, notes=(*_notes(hf, settings, padded=padded), *hf.notes)), ())


def _nothing_fits(directory: Path, attempts: Sequence[_Attempt]) -> str:
    nearest = min(attempts, key=lambda attempt: len(attempt.problems))
    return (
        f"the arguments saved in {directory} are of no family that is known; the nearest is "
        f"{', '.join(nearest.family.architectures)}, but for:{listing(nearest.problems)}\n"
        "Give the hf= of the model that was trained"
    )


def _notes(hf: HFModel, settings: Settings, *, padded: bool) -> Iterator[str]:
    """What users of an output have to know."""
    tokenizer = settings.get("tokenizer_model")
    name = f": {tokenizer}" if isinstance(tokenizer, str) and not Path(tokenizer).is_absolute() else ""
    yield "there is no tokenizer here: copy the files of the one that training used" + name
    yield f"config.json, of {hf.family.architectures[0]}, is made of the arguments that training saved"
    if padded:
        yield f"vocab_size is {settings['vocab_size']:,}, which Megatron padded; vocab_size= gives the tokenizer's own"
    used = in_use(hf.family.settings(hf.config)).keys() & hf.family.settings(hf.config).keys()
    unsaid = [name for name in DEFAULTS if name in used and name not in settings and DEFAULTS[name] is not None]
    if unsaid:
        yield f"the saved arguments have no {', '.join(map(argument, unsaid))}: Megatron's defaults are taken"
