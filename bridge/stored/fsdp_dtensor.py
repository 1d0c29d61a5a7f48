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
from typing import Any

from amaxbridge.bridge.stored.renamed_source import RenamedSource
from amaxbridge.bridge.stored.stored_source import Join, Region, StoredSource
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint

_WRAPPED = re.compile(r"model\.(?:module\.)+")
_ARGUMENTS = "args"


class FsdpCheckpoint(RenamedSource):
    """A checkpoint of Megatron-FSDP; see `StoredSource`.

    Args:
        checkpoint: the same files, under the keys that they have.
    """

    def __init__(self, checkpoint: DistCheckpoint) -> None:
        super().__init__(checkpoint, {_WRAPPED.sub("", key, count=1): key for key in checkpoint.tensors})
        self._checkpoint = checkpoint

    @staticmethod
    def fits(checkpoint: DistCheckpoint) -> bool:
        """True if the keys are those of a wrapped model in the state of training."""
        return any(_WRAPPED.match(key) for key in checkpoint.tensors)

    def cuts(self, region: Region) -> Sequence[int]:
        """The first row alone: ranks cut tensors anywhere, in rows or inside them, and lose no order by it."""
        del region
        return [0]

    def whole(self, join: Join) -> StoredSource:
        """Its tensors are whole."""
        del join
        return self

    def arguments(self) -> Any:
        is_there = _ARGUMENTS in self.states
        return self._checkpoint.read_state(self._checkpoint.state(_ARGUMENTS)) if is_there else None
