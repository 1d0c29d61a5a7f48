"""Whether a checkpoint is of the model that config.json describes: all that disagrees, at once, before anything else.

A mapping notices a shape that it cannot take apart, and no more: half the layers, or other widths that divide as well,
would be exported in silence.
"""

from pathlib import Path
from types import SimpleNamespace

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.bridge.stored.saved_arguments import disagreements, read_arguments, saved_sizes
from amaxbridge.bridge.stored.stored_model import FINAL_NORM_OF_HYBRID, StoredModel
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.extras import installed, need
from amaxbridge.mappings.families import FAMILIES
from amaxbridge.mappings.names import is_quantizer_state, kind_of

_MOST = 40  # lines: one for each kind of tensor


def check_described(stored: StoredModel, hf: HFModel, config: SimpleNamespace) -> None:
    """Compares the tensors of a checkpoint, and the arguments saved with it, with config.json.

    Args:
        config: what mappings read of Megatron's configuration.

    Raises:
        CheckpointError: they disagree.
        MissingExtraError: there is nothing to compare with: no arguments, and transformers is not installed.
    """
    found = _disagreements(stored, hf, config)
    if found:
        raise CheckpointError(
            f"{stored.checkpoint.directory} is not the model that {hf.source} describes, "
            f"{', '.join(hf.family.architectures)}:{listing(found, _MOST)}\nGive the hf= of the model that was trained"
        )


def stored_model(opened: DistCheckpoint, hf: HFModel) -> tuple[StoredModel, SimpleNamespace]:
    """The model in a checkpoint under the names of a family, and what mappings read of Megatron's configuration."""
    pattern = hf.family.layer_pattern(hf.config) if FINAL_NORM_OF_HYBRID in opened.tensors else None
    config = SimpleNamespace(**hf.family.module_config(hf.config, pattern), vocab_size=hf.config["vocab_size"])
    return StoredModel(opened, hf.family.spelling(pattern)), config


def _disagreements(stored: StoredModel, hf: HFModel, config: SimpleNamespace) -> list[str]:
    arguments = read_arguments(stored.checkpoint)
    if arguments is None:
        need("Checking a checkpoint without saved arguments against config.json", "transformers")
    found = list(disagreements(arguments, hf)) if arguments is not None else []
    return found + tensor_disagreements(stored, hf, config)


def tensor_disagreements(stored: StoredModel, hf: HFModel, config: SimpleNamespace) -> list[str]:
    """One line for each kind of tensor that is not what the model has; none where transformers is not installed.

    Raises:
        UsageError: as `MegatronSpecs`.
    """
    if not installed("transformers"):
        return []
    specs = MegatronSpecs(hf, config)
    held = {
        name: each.spec
        for name, each in stored.tensors.items()
        if not is_quantizer_state(name) and name not in hf.without_tensor
    }
    return specs.disagreements(held)


def identify(checkpoint: Path) -> str:
    """What a checkpoint is of, as far as its tensors and saved arguments tell, for a person who has to find its config.

    Raises:
        CheckpointError: not a distributed checkpoint.
    """
    opened = DistCheckpoint(checkpoint)
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
    likely = sorted(unused, key=lambda name: unused[name])  # those that would have the fewest others first
    what = f"may be of {', '.join(likely)}" if likely else "has the tensors of no family that is known"
    return f"{opened.directory} {what}; {said}"
