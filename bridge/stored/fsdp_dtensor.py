"""Checkpoints of Megatron-FSDP (`--ckpt-format fsdp_dtensor`): a distributed checkpoint under other names.

PyTorch writes the state of training as it is nested, so that a key is a path in it:

    model.module.decoder.layers.3.self_attention.linear_qkv.weight        the wrapped model
    model.module.decoder.layers.3.mlp.linear_fc1.weight_w, …weight_v      [ffn, hidden]: gate, up
    model.module.decoder.layers.3.mlp.experts.linear_fc1.weight7_w        one expert, by its global number
    optimizer.state.module.….exp_avg, args, iteration, rng_state.…        the training around it

Layers and experts have global numbers: the format has no pipeline. Each tensor is the one that the optimizer steps:
fp32 where training keeps fp32 main parameters, as it does by default. States of modules are not saved, and so no
configuration of a quantizer is.

Source: megatron.core.transformer.fsdp_dtensor_checkpoint; `generate_state_dict` of megatron.training.checkpointing.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from amaxbridge.bridge.stored.stored_source import Join, Region, StoredSource
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.mappings.tensors import TensorSpec

_WRAPPED = re.compile(r"model\.(?:module\.)+")
_ARGUMENTS = "args"


class FsdpCheckpoint:
    """A checkpoint of Megatron-FSDP; see `StoredSource`.

    Args:
        checkpoint: the same files, under the keys that they have.
    """

    def __init__(self, checkpoint: DistCheckpoint) -> None:
        self._checkpoint = checkpoint

    @staticmethod
    def fits(checkpoint: DistCheckpoint) -> bool:
        """True if the keys are those of a wrapped model in the state of training."""
        return any(_WRAPPED.match(key) for key in checkpoint.tensors)

    @property
    def directory(self) -> Path:
        return self._checkpoint.directory

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        held = self._checkpoint.tensors
        return {name: held[key] for name, key in self._keys.items()}

    @property
    def states(self) -> Sequence[str]:
        return self._checkpoint.states

    def spec(self, region: Region) -> TensorSpec:
        return self._checkpoint.spec(self._stored(region))

    def cuts(self, region: Region) -> Sequence[int]:
        """The first row alone: ranks cut tensors anywhere, in rows or inside them, and lose no order by it."""
        del region
        return [0]

    def read(self, regions: Sequence[Region]) -> list[Tensor]:
        return self._checkpoint.read([self._stored(region) for region in regions])

    def state(self, key: str) -> Any:
        return self._checkpoint.state(key)

    def arguments(self) -> Any:
        is_there = _ARGUMENTS in self.states
        return self._checkpoint.read_state(self._checkpoint.state(_ARGUMENTS)) if is_there else None

    def whole(self, join: Join) -> StoredSource:
        del join
        return self

    @cached_property
    def _keys(self) -> dict[str, str]:
        """Megatron's name of each tensor → its key in the checkpoint."""
        return {_WRAPPED.sub("", key, count=1): key for key in self._checkpoint.tensors}

    def _stored(self, region: Region) -> Region:
        return Region(self._keys[region.key], region.index)
