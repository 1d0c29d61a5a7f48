"""Weights that training keeps as codes and scales, in a plan: their formats, and if their blocks survive the join."""

from collections.abc import Iterable, Iterator

import torch

from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.bridge.plan.whole_blocks import ShardedWeight, cut_blocks
from amaxbridge.export.kernels.scaled import Blocks
from amaxbridge.mappings.amax import STORED_SCALES, StoredScalesMapping
from amaxbridge.mappings.errors import MappingError, listing
from amaxbridge.mappings.model_config import ModelConfig

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
    if problems := cut_blocks(_in_square_blocks(plan), config):
        raise MappingError(
            f"{len(problems)} weights have blocks of {BLOCK}×{BLOCK} that come from several Megatron "
            f"blocks, each with its own scale:{listing(problems)}\n"
            "scheme=fp8_block quantizes the dequantized weights to new blocks; scheme=none writes them in 16 bits"
        )


def _in_square_blocks(plan: Iterable[BundlePlan]) -> Iterator[tuple[ShardedWeight, Blocks, str]]:
    for bundle in plan:
        shapes = {part.name: part.shard.shape for part in bundle.parts}
        for part in bundle.parts:
            if isinstance(part.mapping, StoredScalesMapping) and part.shard.dtype == torch.float32:
                mapping = part.mapping.follows
                weight = ShardedWeight(mapping, shapes[mapping.megatron_param], bundle.ranks_of(part))
                yield weight, Blocks(BLOCK, BLOCK), ""
