"""What a model's files hold beside the language model that Megatron trains: a vision tower, and what joins it.

It goes into an export unchanged, from the Hugging Face directory, which must have weights then.
"""

import logging
import re
from collections.abc import Iterator

from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec

_log = logging.getLogger("amaxbridge")


def carried_specs(hf: HFModel, *, required: bool) -> dict[str, TensorSpec]:
    """The tensors that are carried over, by name; none for a model that is a language model.

    Args:
        required: raise where the directory does not have them; else warn, and give none.

    Raises:
        UsageError: the directory does not have them, or has them quantized.
    """
    prefixes = hf.family.carried
    if not prefixes:
        return {}
    try:
        with SafetensorsCheckpoint(hf.weights_directory) as checkpoint:
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
    """The same, read one by one."""
    if hf.family.carried:
        with SafetensorsCheckpoint(hf.weights_directory) as checkpoint:
            for name in [name for name in checkpoint.tensors if name.startswith(hf.family.carried)]:
                yield name, checkpoint.read(name)


def ignored(hf: HFModel) -> list[str]:
    """For `ignore`: what is carried over, and a tied head. Engines have them under other names than files, so patterns.

    transformers: `model.vision_tower.…`, `lm_head`; files: `vision_tower.…`, `language_model.lm_head`.
    """
    if not hf.family.carried:
        return []
    heads = [module_of(name).rpartition(".")[2] for name in hf.tied_head]
    return [*(f"re:.*{re.escape(prefix)}" for prefix in hf.family.carried), *heads]
