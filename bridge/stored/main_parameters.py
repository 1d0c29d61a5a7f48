"""The fp32 main parameters that an optimizer keeps of 16-bit weights, in place of the weights.

Training rounds them to the weights after each step. A checkpoint holds them in one of several forms:

    optimizer.state.param.NAME           fully_reshardable: as the weight NAME, whose form the tensor has, too
    optimizer.state.fp32_param.NAME      an optimizer that is not distributed; fully_sharded_model_space
    model.module.NAME                    Megatron-FSDP: the weights of the checkpoint themselves
    optimizer.distributed.dp_group_…     dp_reshardable, dp_zero_gather_scatter: flat buffers, which name no parameter

Source: megatron.core.optimizer.distrib_optimizer, `sharded_state_dict`; `make_sharded_optimizer_tensor` of
megatron.core.dist_checkpointing.optimizer.
"""

import re

import torch

from amaxbridge.bridge.stored.renamed_source import RenamedSource
from amaxbridge.bridge.stored.stored_model import is_of_model
from amaxbridge.bridge.stored.stored_source import StoredSource
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.names import is_quantizer_state

_MAIN = re.compile(r"(?:chained_\d+\.)*optimizer\.state\.(?:fp32_)?param\.(.+)")
_IN_BUFFERS = re.compile(r"(?:chained_\d+\.)*optimizer\.distributed\.")
_RESHARDABLE = "Load it in Megatron and save it with --dist-ckpt-optim-fully-reshardable"
MODEL, FP32_MAIN = "model", "fp32_main"


def takes_main_parameters(weights: str) -> bool:
    """The meaning of the option `weights`.

    Raises:
        UsageError: unknown value.
    """
    if weights not in (MODEL, FP32_MAIN):
        raise UsageError(f"unknown weights={weights}; known: {MODEL}, {FP32_MAIN}")
    return weights == FP32_MAIN


def main_parameters(source: StoredSource) -> StoredSource:
    """The checkpoint with fp32 main parameters in place of its weights. fp32 weights stay as they are.

    Raises:
        CheckpointError: weights have no main parameter that is known by their name, or one of another shape.
    """
    tensors = source.tensors
    found = {match[1]: key for key in tensors if (match := _MAIN.fullmatch(key))}
    weights = {name: spec for name, spec in tensors.items() if is_of_model(name) and not is_quantizer_state(name)}
    main = {name: key for name, key in found.items() if name in weights}
    other = [
        f"{name}: {weights[name]}, but its main parameter is {tensors[key]}"
        for name, key in main.items()
        if tensors[key].shape != weights[name].shape or tensors[key].dtype != torch.float32
    ]
    if other:
        raise CheckpointError(
            f"{source.directory}: {len(other)} main parameters are not stored as their weights:{listing(other)}\n"
            f"{_RESHARDABLE}, or export the weights (weights={MODEL})"
        )
    missing = [name for name, spec in weights.items() if name not in main and spec.dtype != torch.float32]
    if missing:
        in_buffers = any(_IN_BUFFERS.match(name) for name in (*tensors, *source.states))
        why = "its optimizer keeps them in flat buffers, which name no parameter. " if in_buffers and not main else ""
        raise CheckpointError(
            f"{source.directory} has no fp32 main parameters of {len(missing)} weights: {why}"
            f"{_RESHARDABLE}, or export the weights (weights={MODEL}):{listing(missing)}"
        )
    return RenamedSource(source, {**{name: name for name in tensors}, **main})
