"""Joins shards to the tensor that one rank would hold: to Hugging Face's tensors and back, as mappings say."""

from collections.abc import Callable, Sequence

from torch import Tensor

from amaxbridge.bridge.stored.stored_source import Join
from amaxbridge.mappings.errors import CheckpointError, MappingError
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import is_quantizer_state
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.mappings.tensors import max_of


def joining(registry: MappingRegistry, config: ModelConfig, spelling: Callable[[str], str]) -> Join:
    """The `Join` of a model.

    A tensor without a mapping, or with shards that do not fit, keeps the shape of its first shard: it is only read, and
    then refused, if nothing has refused it by its name and shape before.

    Args:
        spelling: global name in a checkpoint → the mappings' name.
    """

    def join(name: str, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        if name.endswith("amax") and is_quantizer_state(name) and all(shard.numel() == 1 for shard in shards):
            return max_of(shards)  # of one quantizer, which ranks may not have kept in sync
        try:
            mapping = registry.megatron_to_hf_lookup(spelling(name))
            if mapping is None:
                raise MappingError(
                    f"{name}: nothing says how the shards of {len(shards)} ranks are joined. Load the checkpoint in "
                    "Megatron and save it with --ckpt-format torch_dist"
                )
            replicated = mapping.shard_dim is None
            return shards[0] if replicated else mapping.split(mapping.join(shards, config), config, 0, 1)
        except MappingError as error:
            if shards[0].is_meta:
                return shards[0]
            raise CheckpointError(str(error)) from error

    return join
