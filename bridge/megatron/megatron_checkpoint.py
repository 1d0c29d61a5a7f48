"""Saves and loads a live model as Megatron's training does."""

import contextlib
import inspect
import io
import queue
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, _get_filesystem_reader
from megatron.core.models.common.language_module.language_module import LanguageModule
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state, save_sharded_modelopt_state
from torch import Tensor

from amaxbridge.bridge.live.model_walk import walk_all_quantizers
from amaxbridge.bridge.live.quantized_parameters import is_quantized
from amaxbridge.bridge.megatron.insert_quantizers import cache_quantizers
from amaxbridge.bridge.megatron.patches import Patch, patched
from amaxbridge.bridge.megatron.process_groups import process_ranks
from amaxbridge.bridge.stored.checkpoint_kinds import LATEST
from amaxbridge.bridge.stored.saved_iteration import RELEASE, checkpoint_iteration
from amaxbridge.bridge.stored.stored_model import StoredModel
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.names import is_quantizer_state, module_of
from amaxbridge.mappings.ranks import Axis

_PICKLES_ALLOWED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_PICKLE_REFUSED = (
    "{} holds scaling factors of FP8 training with the delayed recipe. Transformer Engine keeps them as pickles, which "
    f"may run code, and only loads them if {_PICKLES_ALLOWED}=1 is set in the environment: set it if the checkpoint "
    "is your own. An export of the checkpoint does not need them"
)

type Model = LanguageModule | Sequence[LanguageModule]
"""A rank's model, or the chunks of its virtual pipeline."""


def save_checkpoint(model: Model, path: Path, *, iteration: int | None, arguments: Namespace | None = None) -> Path:
    """Saves weights and ModelOpt state as Megatron's training does, in `path/iter_NNNNNNN`, and notes it as the latest.

    The save is synchronous. Megatron hands its results over through a manager process, which would start by importing
    the main program again, for many seconds; a plain queue does the same within the process.

    Args:
        iteration: None for the initial weights of a training: Megatron's `release`.
        arguments: arguments of training, saved as `args`.
    """
    name = RELEASE if iteration is None else f"iter_{iteration:07d}"
    directory = path / name
    directory.mkdir(parents=True, exist_ok=True)
    ranks = process_ranks()
    ranks.all_gather_object(Axis.WORLD, None)
    chunks = _chunks(model)
    state = {"iteration": iteration or 0, "checkpoint_version": 3.0, **_sharded_state(chunks)}
    with patched(Patch(filesystem_async, "_results_queue", queue.Queue())):
        dist_checkpointing.save(state if arguments is None else {**state, "args": arguments}, str(directory))
        save_sharded_modelopt_state(chunks, directory)
    if ranks.rank(Axis.WORLD) == 0:
        (path / LATEST).write_text(RELEASE if iteration is None else str(iteration))
    ranks.all_gather_object(Axis.WORLD, None)
    return directory


def load_checkpoint(model: Model, path: Path) -> None:
    """Loads weights and ModelOpt state of a Megatron distributed checkpoint into a freshly built model.

    Raises:
        CheckpointError: there is no checkpoint, it does not fit the model, or a quantizer did not get all of its state.
    """
    directory, chunks = checkpoint_iteration(path), _chunks(model)
    stored = StoredModel(DistCheckpoint(directory))
    try:
        if (directory / "modelopt_state").is_dir():
            cache = any("_bmm_quantizer." in name for name in stored.tensors)
            printed = contextlib.redirect_stdout(io.StringIO())  # ModelOpt prints
            with printed, cache_quantizers(wanted=cache), metadata_without_strides():
                restore_sharded_modelopt_state(chunks, directory)
    except ValueError as error:
        raise CheckpointError(
            f"ModelOpt cannot restore the quantizers of {directory}: {error}\n"
            "A model of experts that are a module each has quantizers at TP=1 or at EP=1: export it at TP=1 or EP=1"
        ) from error
    except Exception as error:
        raise CheckpointError(f"ModelOpt cannot restore the quantizers of {directory}: {_reason(error)}") from error
    _prepare_buffers(chunks, stored)
    try:
        wanted = _sharded_state(chunks)
        for each in wanted.values():
            _spell_as_stored(each, stored)
        empty = {name: _without_absent_states(wanted[name], stored) for name in wanted}
        with metadata_without_strides():
            state: dict[str, Any] = dist_checkpointing.load(dict(wanted), str(directory), _strategy())
        for name, chunk in zip(wanted, chunks, strict=True):
            state[name] |= empty[name]
            chunk.load_state_dict(state[name])
            if any(map(is_quantized, chunk.parameters())):  # delayed scaling: codes need the scale, which came last
                chunk.load_state_dict(state[name])
    except Exception as error:
        if _PICKLES_ALLOWED in str(error):
            raise CheckpointError(_PICKLE_REFUSED.format(directory)) from None
        raise CheckpointError(f"{directory} does not fit the model: {_reason(error)}") from error
    _check_buffers(chunks, stored)


@contextlib.contextmanager
def metadata_without_strides() -> Iterator[None]:
    """Inside, Megatron can read tensor metadata of torch 2.15 and later.

    It includes strides, and Megatron 0.19 passes all metadata to `torch.empty`, which takes no strides.
    """
    original = TorchDistLoadShardedStrategy.load_tensors_metadata

    def load(strategy: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
        found = _get_filesystem_reader(checkpoint_dir).read_metadata() if metadata is None else metadata
        for entry in found.state_dict_metadata.values():
            if (properties := getattr(entry, "properties", None)) is not None:
                vars(properties).pop("strides", None)  # the class default, None, remains
        return original(strategy, checkpoint_dir, found)

    TorchDistLoadShardedStrategy.load_tensors_metadata = load
    try:
        yield
    finally:
        TorchDistLoadShardedStrategy.load_tensors_metadata = original


def _reason(error: Exception) -> str:
    """The text of a PyTorch error, without its advice to load pickles that may run code."""
    return "a pickle in it names objects that may run code" if "weights_only" in str(error) else str(error)


def _strategy() -> Any:
    """A strategy that reads a parameter whole before it is quantized.

    Megatron 0.19 would read gate and up of a fused linear into one FP8 tensor in turn; the second's scale would also
    apply to the first.
    """
    known = inspect.signature(TorchDistLoadShardedStrategy).parameters
    return TorchDistLoadShardedStrategy(stream_ckpt_dequant=False) if "stream_ckpt_dequant" in known else None


def _spell_as_stored(wanted: dict[str, Any], stored: StoredModel) -> None:
    """Asks for each tensor under the key that the checkpoint has for it, where that is another spelling of its name.

    Megatron's own layers and Transformer Engine's differ in whether a norm is part of the linear after it.
    """
    keys = {canonical(key): key for key in stored.checkpoint.tensors}
    for each in wanted.values():
        if isinstance(each, ShardedTensor) and each.key not in stored.checkpoint.tensors:
            each.key = keys.get(canonical(each.key), each.key)


def _without_absent_states(wanted: dict[str, Any], stored: StoredModel) -> dict[str, Tensor]:
    """Removes the module states that the checkpoint lacks from `wanted`; returns empty ones.

    Each Transformer Engine module asks for its state, which is empty outside FP8 training. A checkpoint of Megatron's
    own layers (`import_hf`) has none. No quantizer state is lost: `_check_buffers` checks all of it.
    """
    saved = set(stored.checkpoint.states)
    absent = [
        name
        for name, each in wanted.items()
        if "_extra_state" in name and isinstance(each, ShardedObject) and each.unique_key not in saved
    ]
    for name in absent:
        del wanted[name]
    return {name: torch.empty(0, dtype=torch.uint8) for name in absent}


def _prepare_buffers(chunks: Sequence[LanguageModule], stored: StoredModel) -> None:
    """Gives each quantizer all of its buffers in the checkpoint, amax in fp32, filled with NaN until they are loaded.

    ModelOpt makes amax buffers in the model's dtype, which would round. In a grouped linear (`TEGroupedMLP`), ModelOpt
    0.47 leaves an amax only to the first expert: `modelopt_post_restore` resets all and calibrates one again.
    """
    known, quantizers = _stored_buffers(stored), _quantizers(chunks)
    held = {name for names in process_ranks().all_gather_object(Axis.WORLD, list(quantizers)) for name in names}
    nowhere = [f"{name}.{buffer}" for name in known if name not in held for buffer in known[name]]
    beside = {
        (module_of(name), buffer): tensor
        for name, quantizer in quantizers.items()
        for buffer, tensor in quantizer.named_buffers(recurse=False)
    }
    for name, quantizer in quantizers.items():
        for buffer in known.get(name, ()):
            like = getattr(quantizer, buffer, beside.get((module_of(name), buffer)))
            if like is None:
                nowhere.append(f"{name}.{buffer}")
                continue
            dtype = torch.float32 if buffer.endswith("_amax") else like.dtype
            quantizer.register_buffer(buffer, torch.full_like(like, torch.nan, dtype=dtype))
    if nowhere:
        raise CheckpointError(
            f"{stored.checkpoint.directory}: after ModelOpt restored the model, it has no place for "
            f"{len(nowhere)} values of quantizers:{listing(nowhere)}\nExport the checkpoint itself (convert_checkpoint)"
        )


def _check_buffers(chunks: Sequence[LanguageModule], stored: StoredModel) -> None:
    known = _stored_buffers(stored)
    lost = [
        f"{name}.{buffer}"
        for name, quantizer in _quantizers(chunks).items()
        for buffer in known.get(name, ())
        if getattr(quantizer, buffer).isnan().any()
    ]
    if lost:
        raise CheckpointError(
            f"{stored.checkpoint.directory}: {len(lost)} values of quantizers did not reach the model, or are NaN:"
            f"{listing(lost)}"
        )


def _stored_buffers(stored: StoredModel) -> dict[str, list[str]]:
    """Global name of a quantizer → its buffers in the checkpoint."""
    buffers: dict[str, list[str]] = {}
    for name in stored.tensors:
        if is_quantizer_state(name):
            buffers.setdefault(module_of(name), []).append(name.rpartition(".")[2])
    return buffers


def _quantizers(chunks: Sequence[LanguageModule]) -> dict[str, Any]:
    """This rank's quantizers by global name; stages of sequential quantizers are named as in checkpoints."""
    return {re.sub(r"\[(\d+)\]", r"\1", each.name): each.module for each in walk_all_quantizers(chunks)}


def _chunks(model: Model) -> list[LanguageModule]:
    return list(model) if isinstance(model, Sequence) else [model]


def _sharded_state(chunks: Sequence[LanguageModule]) -> dict[str, Any]:
    """The sharded state of the chunks, under the names of Megatron's training."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
