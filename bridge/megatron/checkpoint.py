"""Saving and loading a live model as Megatron's training does."""

import contextlib
import io
import queue
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state, save_sharded_modelopt_state

from bridge.megatron.groups import process_ranks
from bridge.parameters import walk_quantizers
from bridge.torch_dist import LATEST, checkpoint_iteration
from mappings.errors import CheckpointError
from mappings.ranks import Axis


def save_checkpoint(model: GPTModel, path: Path, *, iteration: int) -> Path:
    """Saves weights and ModelOpt state as Megatron's training does, in `path/iter_NNNNNNN`, and notes it as the latest.

    The save is synchronous. Megatron hands its results over through a manager process, which would start by importing
    the main program again, for many seconds; a plain queue does the same within the process.
    """
    filesystem_async._results_queue = queue.Queue()
    directory = path / f"iter_{iteration:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    ranks = process_ranks()
    ranks.all_gather_object(Axis.WORLD, None)
    state = {"iteration": iteration, "checkpoint_version": 3.0, "model": model.sharded_state_dict()}
    dist_checkpointing.save(state, str(directory))
    save_sharded_modelopt_state([model], directory)
    if ranks.rank(Axis.WORLD) == 0:
        (path / LATEST).write_text(str(iteration))
    ranks.all_gather_object(Axis.WORLD, None)
    return directory


def load_checkpoint(model: GPTModel, path: Path) -> None:
    """Loads weights and ModelOpt state of a Megatron distributed checkpoint into a freshly built model.

    Raises:
        CheckpointError: no checkpoint, or one that does not fit the model.
    """
    directory = checkpoint_iteration(path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints on every rank
            restore_sharded_modelopt_state([model], directory)
    except ValueError as error:
        raise CheckpointError(
            f"ModelOpt cannot restore the quantizers of {directory}: {error}\n"
            "A model of experts that are a module each has quantizers at TP=1 or at EP=1: export it at TP=1 or EP=1"
        ) from error
    for quantizer in walk_quantizers([model]):  # ModelOpt makes the buffers in the model's dtype, and would round here
        if getattr(quantizer.module, "_amax", None) is not None:
            quantizer.module._amax = quantizer.module._amax.float()
    try:
        state: dict[str, Any] = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory))
        model.load_state_dict(state["model"])
    except Exception as error:
        raise CheckpointError(f"{directory} does not fit the model: {error}") from error
