"""Weights that training keeps as codes and scales, in a plan: their formats, and if their blocks survive the join."""

from collections.abc import Iterable

import torch

from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.bridge.plan.whole_blocks import ShardedWeight, cut_weights
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
    problems, known = list[str](), dict[tuple[object, ...], list[int]]()
    for bundle in plan:
        shapes = {part.name: part.shard.shape for part in bundle.parts}
        for part in bundle.parts:
            if not isinstance(part.mapping, StoredScalesMapping) or part.shard.dtype != torch.float32:
                continue
            mapping = part.mapping.follows
            weight = ShardedWeight(mapping, shapes[mapping.megatron_param], bundle.ranks_of(part))
            if weight.kind not in known:
                known[weight.kind] = cut_weights(weight, Blocks(BLOCK, BLOCK), config)
            problems += [weight.named(mapping.targets[index]) for index in known[weight.kind]]
    if problems:
        raise MappingError(
            f"{len(problems)} weights have blocks of {BLOCK}×{BLOCK} that come from several Megatron "
            f"blocks, each with its own scale:{listing(problems)}\n"
            "scheme=fp8_block quantizes the dequantized weights to new blocks; scheme=none writes them in 16 bits"
        )
