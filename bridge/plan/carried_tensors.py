"""Tensors of a model's files beside the language model that Megatron trains: a vision tower and its projector.

They go into an export unchanged, from the Hugging Face directory, which must then have weights.
"""

import logging
import re
from collections.abc import Iterator

from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec

_log = logging.getLogger("amaxbridge")


def carried_specs(hf: HFModel, *, required: bool) -> dict[str, TensorSpec]:
    """The tensors that are carried over, by name; none for a pure language model.

    Args:
        required: raise if the directory lacks them; otherwise warn, and return none.

    Raises:
        UsageError: the directory lacks these tensors, or they are quantized.
    """
    prefixes = hf.family.carried
    if not prefixes:
        return {}
    try:
        with hf.open_files() as checkpoint:
            specs = {name: each.spec for name, each in checkpoint.tensors.items() if name.startswith(prefixes)}
    except CheckpointError:
        specs = {}
    if any(not spec.dtype.is_floating_point or spec.dtype.itemsize == 1 for spec in specs.values()):
        raise UsageError(f"{hf.directory} is quantized outside its language model: give the model it was made from")
    missing = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in specs)]
    if not missing:
        return specs
    message = (
        f"{hf.directory} has no weights of {', '.join(missing)} which Megatron lacks, too: give hf= a directory "
        "with the whole model"
    )
    if required:
        raise UsageError(message)
    _log.warning("%s", message)
    return {}


def carried_tensors(hf: HFModel) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors of `carried_specs`, one by one."""
    if hf.family.carried:
        with hf.open_files() as checkpoint:
            for name in [name for name in checkpoint.tensors if name.startswith(hf.family.carried)]:
                yield name, checkpoint.read(name)


def ignored(hf: HFModel) -> list[str]:
    """Entries of `ignore` for carried tensors and a tied head: patterns, because names in engines and files differ.

    transformers: `model.vision_tower.…`, `lm_head`; files: `vision_tower.…`, `language_model.lm_head`.
    """
    if not hf.family.carried:
        return []
    heads = [module_of(name).rpartition(".")[2] for name in hf.tied_head]
    return [*(f"re:.*{re.escape(prefix)}" for prefix in hf.family.carried), *heads]
