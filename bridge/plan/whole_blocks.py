"""Blocks of a Hugging Face weight that Megatron's shards cut: engines have one scale for them, training several.

Quantizers see the shard of a rank, in Megatron's fused order. A Hugging Face weight has the same blocks if each of its
blocks lies inside one of theirs: cuts between q, k and v, gate and up, and ranks must fall on block boundaries.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from amaxbridge.export.kernels.scaled import Blocks
from amaxbridge.export.schemes import Scheme
from amaxbridge.mappings.errors import MappingError, listing
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import kind_of, module_of


class ShardedWeight(NamedTuple):
    """A Megatron weight: its mapping, the shape `[out, in]` of each rank's shard, and the number of ranks."""

    mapping: MegatronParamMapping
    shape: tuple[int, ...]
    ranks: int

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for weights that are cut alike."""
        return type(self.mapping), *map(kind_of, (self.mapping.megatron_param, *self.mapping.targets)), *self[1:]

    def named(self, target: str) -> str:
        """One of its Hugging Face weights, for a message."""
        of = f"{target}, of {self.mapping.megatron_param} {list(self.shape)}"
        return of if self.ranks == 1 else f"{of} on each of {self.ranks} ranks"


def check_quantizers_blocks(
    weights: Iterable[ShardedWeight], schemes: Mapping[str, Scheme], config: ModelConfig
) -> None:
    """Refuses quantizers whose blocks are not those of the Hugging Face weights.

    Args:
        schemes: Hugging Face module → the scheme that its weight's quantizer has.

    Raises:
        MappingError: there are such weights; all of them are named.
    """
    pairs = ((weight, _scheme_of(weight, schemes)) for weight in weights if len(weight.shape) == 2)
    in_blocks = ((weight, scheme.blocks, f": {scheme.name}") for weight, scheme in pairs if scheme is not None)
    if problems := cut_blocks(in_blocks, config):
        raise MappingError(
            f"{len(problems)} weights have blocks that Megatron's fused shards cut: training and engines compute "
            f"them with different scales:{listing(problems)}\n"
            "Choose a tensor-parallel size at which shards consist of whole blocks, a format with smaller blocks, or "
            "leave these modules unquantized"
        )


def _scheme_of(weight: ShardedWeight, schemes: Mapping[str, Scheme]) -> Scheme | None:
    """The scheme of the quantizer that its Hugging Face weights share; None without one."""
    return next(filter(None, (schemes.get(module_of(target)) for target in weight.mapping.targets)), None)


def cut_blocks(weights: Iterable[tuple[ShardedWeight, Blocks, str]], config: ModelConfig) -> list[str]:
    """A line for each Hugging Face weight with a block that spans several blocks of the shards.

    Args:
        weights: each with its blocks, and what its lines end in.
    """
    lines, known = list[str](), dict[tuple[object, ...], list[int]]()
    for weight, blocks, end in weights:
        kind = (*weight.kind, blocks)
        if kind not in known:
            known[kind] = cut_weights(weight, blocks, config)
        lines += [weight.named(weight.mapping.targets[index]) + end for index in known[kind]]
    return lines


def cut_weights(weight: ShardedWeight, blocks: Blocks, config: ModelConfig) -> list[int]:
    """The positions among the mapping's targets of the weights with a block that spans several blocks of the shards."""
    mapping, (rows, columns), ranks = weight
    if ranks > 1 and mapping.shard_dim == 1 and blocks.width is not None and columns % blocks.width:
        return list(range(len(mapping.targets)))
    if (height := blocks.height or 1) == 1:
        return []
    of_rank = -(-rows // height)
    numbers = [(torch.arange(rows) // height + rank * of_rank)[:, None] for rank in range(ranks)]
    joined = mapping.join(numbers, config).values()
    return [index for index, found in enumerate(joined) if not _is_whole(found[:, 0], height)]


def _is_whole(numbers: Tensor, height: int) -> bool:
    return torch.equal(numbers[::height].repeat_interleave(height)[: len(numbers)], numbers)
