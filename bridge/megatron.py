"""Megatron-Core and ModelOpt: process groups, building a model, loading a checkpoint. The only user of both.

Megatron's model classes and module paths move between releases (GPTModel is announced as deprecated in favour of
HybridModel); what has to follow is here.
"""

import contextlib
import io
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state, save_sharded_modelopt_state

from bridge.cpu import TRANSFORMER_CONFIG_FOR_CPU, enable_cpu
from bridge.hf_config import HFModel
from bridge.parameters import walk_quantizers
from bridge.ranks import ProcessRanks, process_group
from bridge.torch_dist import LATEST, checkpoint_iteration
from mappings.errors import CheckpointError
from mappings.ranks import Axis


def process_ranks() -> ProcessRanks:
    """This process among the others, in the groups that Megatron's parallel state holds."""
    return ProcessRanks(
        {
            Axis.TP: parallel_state.get_tensor_model_parallel_group(),
            Axis.ETP: parallel_state.get_expert_tensor_parallel_group(),
            Axis.EP: parallel_state.get_expert_model_parallel_group(),
            Axis.PP: parallel_state.get_pipeline_model_parallel_group(),
            Axis.DP: parallel_state.get_data_parallel_group(),
        }
    )


@contextlib.contextmanager
def distributed(*, tp: int, pp: int = 1, seed: int = 1234) -> Iterator[None]:
    """Megatron's process groups and random seeds for the `torchrun` (or single) process this runs in."""
    enable_cpu()
    with process_group():
        parallel_state.initialize_model_parallel(tp, pp)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def build_model(hf: HFModel, *, dtype: torch.dtype = torch.bfloat16) -> GPTModel:
    """A freshly initialized Megatron model of a Hugging Face configuration: this rank's shards.

    Uses Megatron-Core's own layers (no Transformer Engine), so that it runs wherever torch does.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    arguments = hf.family.model_arguments(hf.config)
    arguments["vocab_size"] += -arguments["vocab_size"] % tp
    config = TransformerConfig(
        **hf.family.transformer_config(hf.config),
        activation_func=torch.nn.functional.silu,
        init_method_std=hf.config.get("initializer_range", 0.02),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        **({} if torch.cuda.is_available() else TRANSFORMER_CONFIG_FOR_CPU),
    )
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    model = GPTModel(
        config,
        spec,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **arguments,
    )
    return model.to(dtype)


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
    with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints on every rank
        restore_sharded_modelopt_state([model], directory)
    for quantizer in walk_quantizers([model]):  # ModelOpt makes the buffers in the model's dtype, and would round here
        if getattr(quantizer.module, "_amax", None) is not None:
            quantizer.module._amax = quantizer.module._amax.float()
    try:
        state: dict[str, Any] = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory))
        model.load_state_dict(state["model"])
    except Exception as error:
        raise CheckpointError(f"{directory} does not fit the model: {error}") from error
