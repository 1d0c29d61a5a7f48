"""Saving and loading a live model as Megatron's training does."""

import contextlib
import io
import queue
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.language_module.language_module import LanguageModule
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state, save_sharded_modelopt_state

from amaxbridge.bridge.live.model_walk import walk_quantizers
from amaxbridge.bridge.megatron.insert_quantizers import cache_quantizers
from amaxbridge.bridge.megatron.process_groups import process_ranks
from amaxbridge.bridge.stored.torch_dist import LATEST, RELEASE, DistCheckpoint, checkpoint_iteration
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.ranks import Axis

type Model = LanguageModule | Sequence[LanguageModule]
"""A rank's model, or the chunks of its virtual pipeline."""


def save_checkpoint(model: Model, path: Path, *, iteration: int | None, arguments: Namespace | None = None) -> Path:
    """Saves weights and ModelOpt state as Megatron's training does, in `path/iter_NNNNNNN`, and notes it as the latest.

    The save is synchronous. Megatron hands its results over through a manager process, which would start by importing
    the main program again, for many seconds; a plain queue does the same within the process.

    Args:
        iteration: None for weights that training starts from: Megatron's `release`.
        arguments: what Megatron's training keeps as `args`.
    """
    filesystem_async._results_queue = queue.Queue()
    name = RELEASE if iteration is None else f"iter_{iteration:07d}"
    directory = path / name
    directory.mkdir(parents=True, exist_ok=True)
    ranks = process_ranks()
    ranks.all_gather_object(Axis.WORLD, None)
    chunks = _chunks(model)
    state = {"iteration": iteration or 0, "checkpoint_version": 3.0, **_sharded_state(chunks)}
    dist_checkpointing.save(state if arguments is None else {**state, "args": arguments}, str(directory))
    save_sharded_modelopt_state(chunks, directory)
    if ranks.rank(Axis.WORLD) == 0:
        (path / LATEST).write_text(RELEASE if iteration is None else str(iteration))
    ranks.all_gather_object(Axis.WORLD, None)
    return directory


def load_checkpoint(model: Model, path: Path) -> None:
    """Loads weights and ModelOpt state of a Megatron distributed checkpoint into a freshly built model.

    Raises:
        CheckpointError: no checkpoint, or one that does not fit the model.
    """
    directory, chunks = checkpoint_iteration(path), _chunks(model)
    try:
        if (directory / "modelopt_state").is_dir():
            cache = any("_bmm_quantizer." in name for name in DistCheckpoint(directory).tensors)
            with contextlib.redirect_stdout(io.StringIO()), cache_quantizers(wanted=cache):  # ModelOpt prints
                restore_sharded_modelopt_state(chunks, directory)
    except ValueError as error:
        raise CheckpointError(
            f"ModelOpt cannot restore the quantizers of {directory}: {error}\n"
            "A model of experts that are a module each has quantizers at TP=1 or at EP=1: export it at TP=1 or EP=1"
        ) from error
    for quantizer in walk_quantizers(chunks):  # ModelOpt makes the buffers in the model's dtype, and would round here
        if getattr(quantizer.module, "_amax", None) is not None:
            quantizer.module._amax = quantizer.module._amax.float()
    try:
        wanted = _sharded_state(chunks)
        state: dict[str, Any] = dist_checkpointing.load(dict(wanted), str(directory))
        for name, chunk in zip(wanted, chunks, strict=True):
            chunk.load_state_dict(state[name])
    except Exception as error:
        raise CheckpointError(f"{directory} does not fit the model: {error}") from error


def _chunks(model: Model) -> list[LanguageModule]:
    return list(model) if isinstance(model, Sequence) else [model]


def _sharded_state(chunks: Sequence[LanguageModule]) -> dict[str, Any]:
    """Under the names that Megatron's training gives them."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
