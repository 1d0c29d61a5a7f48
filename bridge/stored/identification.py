"""Identifies a checkpoint, and finds all disagreements with config.json at once, before anything else.

A mapping only notices a shape that it cannot split: half the layers, or another width that divides as well, would be
exported silently.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.bridge.stored.checkpoint_kinds import Kind, head_of, kind_of_tensors
from amaxbridge.bridge.stored.join_shards import joining
from amaxbridge.bridge.stored.open_checkpoint import open_checkpoint
from amaxbridge.bridge.stored.saved_arguments import disagreements, read_arguments, saved_sizes
from amaxbridge.bridge.stored.stored_model import FINAL_NORM_OF_HYBRID, StoredModel, is_of_model
from amaxbridge.bridge.stored.stored_source import StoredSource
from amaxbridge.mappings.adapters import AdaptedRegistry, is_adapter
from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.extras import installed, need
from amaxbridge.mappings.families import FAMILIES, classes_of
from amaxbridge.mappings.families.classifiers import SEQUENCES, TOKENS
from amaxbridge.mappings.names import is_quantizer_state, kind_of
from amaxbridge.mappings.tensors import TensorSpec

_MOST = 40  # lines: one for each kind of tensor
_EMBEDDING, _OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
_BIAS = "output_layer.bias"
_ROWS = "rows of vocabulary"
_SIZES = ("layers", "experts in a layer", "columns of hidden size", _ROWS)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.linear_fc1\.weight(\d+)$")


def check_described(stored: StoredModel, hf: HFModel, *, adapters: bool = False) -> None:
    """Compares the tensors of a checkpoint, and the arguments saved with it, with config.json.

    Args:
        adapters: True if adapters are wanted; they are no part of the comparison.

    Raises:
        CheckpointError: the checkpoint is of a kind that cannot be exported (see `checkpoint_kinds`), has the head of a
            classifier that config.json does not mention, or disagrees.
        MissingExtraError: nothing can be compared: no arguments are saved, and transformers is not installed.
    """
    check_kind(stored.checkpoint, adapters=adapters)
    _check_head(stored, hf)
    found = _disagreements(stored, hf)
    if found:
        raise CheckpointError(
            f"{stored.checkpoint.directory} is not the model that {hf.source} describes, "
            f"{', '.join(hf.family.architectures)}:{listing(found, _MOST)}\nGive the hf= of the model that was trained"
        )


def check_kind(checkpoint: StoredSource, *, adapters: bool = False) -> None:
    """Raises CheckpointError for a checkpoint that is not a plain language model. The message says what it is.

    Args:
        adapters: True if adapters are wanted.
    """
    if kind := _kind_of(checkpoint, adapters=adapters):
        raise CheckpointError(f"{checkpoint.directory} is {kind.what}. {kind.next_step}")


def _check_head(stored: StoredModel, hf: HFModel) -> None:
    head = head_of({name: each.spec for name, each in stored.tensors.items()})
    if head is None or hf.family.classifier_of is not None:
        return
    biased = _BIAS in stored.tensors
    known = [name for name in classes_of(hf.written) if name.endswith(TOKENS if biased else SEQUENCES)]
    if known:
        how = f"Export it as what it is: architecture={known[0]} num_labels={head.shape[0]}"
    elif biased and classes_of(hf.written):
        how = f"{', '.join(classes_of(hf.written))} has no bias, and transformers no other class for it"
    else:
        how = f"transformers has no class for {', '.join(hf.family.architectures)} with a head"
    raise CheckpointError(
        f"{stored.checkpoint.directory} is a reward model, a critic or a classifier: it has a head "
        f"{list(head.shape)}{' with a bias' if biased else ''} in place of its output layer. {how}"
    )


def _kind_of(checkpoint: StoredSource, *, adapters: bool = False) -> Kind | None:
    model = {name: spec for name, spec in checkpoint.tensors.items() if is_of_model(name)}
    return kind_of_tensors(model, any_others=len(model) < len(checkpoint.tensors), adapters=adapters)


def stored_model(opened: StoredSource, hf: HFModel) -> StoredModel:
    """The model in a checkpoint under the names of a family."""
    pattern = hf.family.layer_pattern(hf.config) if FINAL_NORM_OF_HYBRID in opened.tensors else None
    spelling = hf.family.spelling(pattern)
    return StoredModel(opened.whole(joining(AdaptedRegistry(hf.registry), hf.model_config, spelling)), spelling)


def _disagreements(stored: StoredModel, hf: HFModel) -> list[str]:
    arguments = read_arguments(stored.checkpoint)
    if arguments is None and hf.family.file is not None and hf.file_tensors is None:
        raise CheckpointError(
            f"{stored.checkpoint.directory} has no saved arguments, and {hf.source} no weights: nothing says if they "
            "are the same model. Give hf= a directory with weights"
        )
    if arguments is None and hf.family.file is None:
        need("Checking a checkpoint without saved arguments against config.json", "transformers")
    found = list(disagreements(arguments, hf)) if arguments is not None else []
    return found + tensor_disagreements(stored, hf)


def tensor_disagreements(stored: StoredModel, hf: HFModel) -> list[str]:
    """One line for each kind of tensor that differs from the model's; empty if nothing says which the model has.

    That is so where transformers is not installed, and for a user's own family without a class or weights.

    Raises:
        UsageError: as `MegatronSpecs`.
    """
    if hf.file_tensors is None and (hf.family.file is not None or not installed("transformers")):
        return []
    found = {each.name: TensorSpec.of(each.tensor) for each in stored.parameters() if not is_adapter(each.name)}
    held = {name: spec for name, spec in found.items() if name not in hf.without_tensor}
    specs = MegatronSpecs(hf, hf.model_config, held=held)
    return [*_other_sizes(held, specs), *specs.disagreements(held)]


def _other_sizes(held: Mapping[str, TensorSpec], specs: MegatronSpecs) -> Iterator[str]:
    """The most frequent differences, in a user's words: layers, experts, hidden size, vocabulary."""
    expected = {name: specs.shard(name, 1) for name in specs.mappings}
    for what, there, wanted in zip(_SIZES, _sizes(held), _sizes(expected), strict=True):
        padded = what == _ROWS and there > wanted
        if there != wanted and not padded:
            yield f"the checkpoint has {there} {what}, but config.json says {wanted}"
    if _OUTPUT_LAYER in expected and _OUTPUT_LAYER not in held and _EMBEDDING in held:
        yield "the checkpoint has no output layer: it is of a model with tied embeddings (tie_word_embeddings), or cut"


def _sizes(tensors: Mapping[str, TensorSpec]) -> tuple[int, ...]:
    """The sizes that `_SIZES` names; 0 for those that are missing."""
    layers = {found[1] for name in tensors if (found := _LAYER.match(name))}
    experts = {found[1] for name in tensors if (found := _EXPERT.search(name))}
    embedding = tensors.get(_EMBEDDING)
    return len(layers), len(experts), *((0, 0) if embedding is None else reversed(embedding.shape))


def identify(checkpoint: Path) -> str:
    """Describes a checkpoint's model from tensors and saved arguments, for a person who must find its config.

    Raises:
        CheckpointError: not a checkpoint of Megatron's training.
    """
    opened = open_checkpoint(checkpoint)
    if kind := _kind_of(opened):
        return f"{opened.directory} is {kind.what}. {kind.next_step}"
    arguments = read_arguments(opened)
    sizes = ", ".join(f"{name}={value}" for name, value in saved_sizes(arguments or {}))
    said = f"its arguments say {sizes}" if sizes else "no arguments of training are saved with it"
    if FINAL_NORM_OF_HYBRID in opened.tensors:
        return f"{opened.directory} is a HybridModel; {said}"
    names = [name for name in StoredModel(opened).tensors if not is_quantizer_state(name)]
    unused: dict[str, int] = {}
    for family in FAMILIES:
        found = [family.registry.megatron_to_hf_lookup(canonical(name)) for name in names]
        if all(found):
            used = {(type(mapping), kind_of(mapping.megatron_param)) for mapping in found if mapping}
            unused[family.architectures[0]] = len(family.mappings) - len(used)
    likely = sorted(unused, key=lambda name: unused[name])  # the families with the fewest unused mappings first
    if (head := head_of(opened.tensors)) is not None:
        said = f"its head {list(head.shape)} is a reward model's, a critic's or a classifier's; {said}"
    what = f"may be of {', '.join(likely)}" if likely else "has the tensors of no family that is known"
    return f"{opened.directory} {what}; {said}"
