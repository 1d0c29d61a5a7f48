"""Saves a model as `--ckpt-format torch` does: see `save_checkpoint` of megatron.training.checkpointing."""

import random
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state as mpu
from modelopt.torch.opt.plugins import save_modelopt_state

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments


def save_legacy(hf: HFModel, chunks: Sequence[Any], path: Path) -> None:
    """The model, a part of an optimizer, and random states; of ranks with equal TP, PP and EP ranks, one writes."""
    arguments = Namespace(**vars(megatron_arguments(hf, chunks[0].config)), params_dtype=torch.bfloat16, bf16=True)
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    state: dict[str, Any] = {"args": arguments, "checkpoint_version": 3.0, "iteration": 7}
    state |= {name: chunk.state_dict_for_save_checkpoint() for name, chunk in zip(names, chunks, strict=True)}
    state["optimizer"] = {"optimizer": {"param_groups": [{"lr": 0.1, "step": 3}]}, "grad_scaler": {"scale": 1.0}}
    state["rng_state"] = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }
    ]
    save_modelopt_state(list(chunks), state)
    if 0 in (mpu.get_data_parallel_rank(), mpu.get_expert_data_parallel_rank()):
        place = path / "iter_0000007" / _directory()
        place.mkdir(parents=True, exist_ok=True)
        torch.save(state, place / "model_optim_rng.pt")
        if mpu.get_data_parallel_rank() == 0:
            torch.save({"a distributed optimizer": torch.ones(3)}, place / "distrib_optim.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()


def _directory() -> str:
    """As `get_checkpoint_name`."""
    name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    if mpu.get_expert_model_parallel_world_size() > 1:
        name += f"_{mpu.get_expert_model_parallel_rank():03d}"
    return name
