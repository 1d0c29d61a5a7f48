"""Weights that training keeps as codes and scales, in a plan: their formats, and whether their blocks survive the join.

A square block has one scale for 128 rows and columns. A Hugging Face weight has the same blocks if each of its blocks
lies inside one of Megatron's: cuts between q, k and v, gate and up, and ranks must fall on block boundaries.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.mappings.amax import STORED_SCALES, StoredScalesMapping
from amaxbridge.mappings.errors import MappingError, listing
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import kind_of

BLOCK = 128
"""Rows and columns of a square block."""


def stored_formats(plan: Iterable[BundlePlan]) -> dict[str, str]:
    """Hugging Face module → the format of its weight, for all weights that are codes and scales in a plan."""
    return {
        target.removesuffix(STORED_SCALES): "fp8_block" if part.shard.dtype == torch.float32 else "mxfp8"
        for bundle in plan
        for part in bundle.parts
        for target in part.tensors
        if target.endswith(STORED_SCALES)
    }


def check_blocks(plan: Iterable[BundlePlan], config: ModelConfig) -> None:
    """Refuses a plan in which a square block of a Hugging Face weight would be made from several Megatron blocks.

    Raises:
        MappingError: there are such weights; all of them are named.
    """
    problems, known = list[str](), dict[tuple[object, ...], list[int]]()
    for bundle in plan:
        shapes = {part.name: part.shard.shape for part in bundle.parts}
        for part in bundle.parts:
            if not isinstance(part.mapping, StoredScalesMapping) or part.shard.dtype != torch.float32:
                continue
            weight = part.mapping.follows
            count = len(bundle.group) if part in bundle.moved_parts else 1
            shape = shapes[weight.megatron_param]
            kind = (type(weight), *map(kind_of, (weight.megatron_param, *weight.targets)), shape, count)
            if kind not in known:
                known[kind] = _cut_blocks(weight, shape, count, config)
            cut = [weight.targets[index] for index in known[kind]]
            problems += [f"{name}, of {weight.megatron_param} {list(shape)} on each of {count} ranks" for name in cut]
    if problems:
        raise MappingError(
            f"{len(problems)} weights have blocks of {BLOCK}×{BLOCK} that come from several Megatron blocks, "
            f"each with its own scale:{listing(problems)}\n"
            "scheme=fp8_block quantizes the dequantized weights to new blocks; scheme=none writes them in 16 bits"
        )


def _cut_blocks(weight: MegatronParamMapping, shape: Sequence[int], count: int, config: ModelConfig) -> list[int]:
    """The positions of the Hugging Face weights with a block that spans several blocks of the shards."""
    rows, columns = shape
    if count > 1 and weight.shard_dim == 1 and columns % BLOCK:
        return list(range(len(weight.targets)))
    blocks = -(-rows // BLOCK)
    numbers = [(torch.arange(rows) // BLOCK + rank * blocks)[:, None] for rank in range(count)]
    joined = weight.join(numbers, config).values()
    return [index for index, found in enumerate(joined) if not _is_whole(found[:, 0])]


def _is_whole(numbers: Tensor) -> bool:
    return torch.equal(numbers[::BLOCK].repeat_interleave(BLOCK)[: len(numbers)], numbers)
