"""The model described by the arguments saved in a Megatron checkpoint, if no Hugging Face directory is given.

Every family is tried: its tables turn the arguments into a Hugging Face config, transformers fills in its defaults, and
the result is read back. The family fits if this gives every saved setting, and Megatron's default of every other
setting, so that nothing is exported as another model. If several families fit, the tensors decide.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from amaxbridge.bridge.hf import HFModel, make_hf_model
from amaxbridge.bridge.stored.checkpoint_kinds import head_of
from amaxbridge.bridge.stored.identification import check_kind, identify, stored_model, tensor_disagreements
from amaxbridge.bridge.stored.open_checkpoint import open_checkpoint
from amaxbridge.bridge.stored.saved_arguments import read_arguments
from amaxbridge.bridge.weight_dtypes import DTYPES
from amaxbridge.mappings.errors import AmaxbridgeError, UsageError, listing
from amaxbridge.mappings.families import CLASSIFIERS, FAMILIES
from amaxbridge.mappings.families.classifiers import SEQUENCES, TOKENS
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.family_file import FamilySource, find_family, own_family
from amaxbridge.mappings.megatron_settings import DEFAULTS, Settings, argument, differences, from_arguments, in_use
from amaxbridge.mappings.tensors import TensorSpec

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A family that was tried: the model, or why it does not fit."""

    family: ModelFamily
    hf: HFModel | None
    problems: Sequence[str]


def model_of_arguments(
    checkpoint: Path,
    *,
    architecture: str | None = None,
    vocab_size: int | None = None,
    family: FamilySource | None = None,
) -> HFModel:
    """The model of a checkpoint. Arguments and errors: see `AutoBridge.from_megatron_checkpoint`."""
    opened = open_checkpoint(checkpoint)
    check_kind(opened, adapters=True)  # an export without adapter= refuses them
    arguments, embedding = read_arguments(opened), opened.tensors.get(_EMBEDDING)
    if arguments is None or embedding is None:
        raise UsageError(
            f"hf= is required for config.json, or a checkpoint with arguments: {identify(opened.directory)}"
        )
    settings = from_arguments(arguments)
    size = vocab_size or settings.get("vocab_size")
    settings["vocab_size"] = size or embedding.shape[0]
    head = head_of(opened.tensors)
    families = [each for each in _families(architecture, family, opened.tensors) if not each.carried]
    if not families:
        raise UsageError(f"{architecture} has modules beside Megatron's model: give hf= a directory with their weights")
    computed = arguments.get("params_dtype")  # Megatron-FSDP saves fp32 main parameters in place of the weights
    dtype = next((known for known in DTYPES.values() if known == computed), embedding.dtype)
    labels = {} if head is None else {"num_labels": head.shape[0]}
    attempts = [_attempt(each, settings, dtype, labels, padded=size is None) for each in families]
    fitting = _preferred([attempt.hf for attempt in attempts if attempt.hf is not None])
    if len(_kinds(fitting)) > 1:
        fitting = [hf for hf in fitting if not tensor_disagreements(stored_model(opened, hf), hf)] or fitting
    if not fitting:
        raise UsageError(_nothing_fits(opened.directory, attempts))
    if len(_kinds(fitting)) > 1:
        names = ", ".join(_kinds(fitting))
        raise UsageError(f"the arguments saved in {opened.directory} fit {names}: choose one with architecture=")
    return fitting[0]


def _families(
    architecture: str | None, family: FamilySource | None, tensors: Mapping[str, TensorSpec]
) -> Sequence[ModelFamily]:
    """The families to try: those of classifiers for a model with a head, by whether it has a bias."""
    if architecture is not None:
        return [find_family(family, {"architectures": [architecture]})]
    if family is not None:
        return [own_family(family)]
    if head_of(tensors) is None:
        return FAMILIES
    kind = TOKENS if "output_layer.bias" in tensors else SEQUENCES
    return [each for each in CLASSIFIERS if each.architectures[0].endswith(kind)]


def _preferred(models: Sequence[HFModel]) -> list[HFModel]:
    """The models, without those whose family says that another of them computes the same."""
    found = {name for hf in models for name in hf.family.architectures}
    return [hf for hf in models if found.isdisjoint(hf.family.alike)]


def _kinds(models: Sequence[HFModel]) -> list[str]:
    """One architecture for each set of mappings: models with equal settings and the same mappings are alike.

    Norms over all heads are no setting, and have other shapes.
    """
    kinds: list[ModelFamily] = []
    for family in (hf.family for hf in models):
        if not any(
            family.mappings == other.mappings and family.norm_over_all_heads == other.norm_over_all_heads
            for other in kinds
        ):
            kinds.append(family)
    return [family.architectures[0] for family in kinds]


def _attempt(
    family: ModelFamily, found: Settings, dtype: torch.dtype, labels: Mapping[str, int], *, padded: bool
) -> _Attempt:
    """Args: labels: the field of config.json that counts those of a classifier."""
    filled = {**DEFAULTS, **found}
    unlike = [f"{argument(name)}: {filled[name]}" for name, value in family.constants.items() if filled[name] != value]
    try:
        settings = family.settings_of(found)
        filled = {**DEFAULTS, **settings}
        tables = {**family.transformer, **family.model, **family.layers}
        missing = [name for name in tables if filled.get(name) is None and DEFAULTS.get(name, "none") is not None]
        if missing:
            return _Attempt(family, None, [*(f"{argument(name)} was not saved" for name in missing), *unlike])
        hf = make_hf_model(family, {**family.hf_config(filled), **labels}, dtype)
        expected = family.settings(hf.config)
    except AmaxbridgeError as error:
        return _Attempt(family, None, [str(error), *unlike])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # a table of numbers that no model has
        return _Attempt(family, None, [f"{type(error).__name__} in making config.json: {error}", *unlike])
    ours, theirs = in_use(filled), in_use(expected)
    problems = [
        f"{argument(name)}: {ours.get(name)}, but the family has {theirs.get(name)}"
        for name in differences(filled, expected)
    ]
    if problems:
        return _Attempt(family, None, problems)
    return _Attempt(family, replace(hf, notes=(*_notes(hf, settings, padded=padded), *hf.notes)), ())


def _nothing_fits(directory: Path, attempts: Sequence[_Attempt]) -> str:
    nearest = min(attempts, key=lambda attempt: len(attempt.problems))
    return (
        f"the arguments saved in {directory} are of no known family; the nearest is "
        f"{', '.join(nearest.family.architectures)}, but for:{listing(nearest.problems)}\n"
        "Give the hf= of the model that was trained"
    )


def _notes(hf: HFModel, settings: Settings, *, padded: bool) -> Iterator[str]:
    """Notes for users of the output."""
    tokenizer = settings.get("tokenizer_model")
    name = f": {tokenizer}" if isinstance(tokenizer, str) and not Path(tokenizer).is_absolute() else ""
    yield "the output has no tokenizer: copy the files of the one that training used" + name
    yield f"config.json, of {hf.family.architectures[0]}, was made from the arguments that training saved"
    if padded:
        yield f"vocab_size is {settings['vocab_size']:,}, which Megatron padded; vocab_size= gives the tokenizer's own"
    used = in_use(hf.family.settings(hf.config)).keys() & hf.family.settings(hf.config).keys()
    unsaid = [name for name in DEFAULTS if name in used and name not in settings and DEFAULTS[name] is not None]
    if unsaid:
        yield f"the saved arguments have no {', '.join(map(argument, unsaid))}: Megatron's defaults were used"
