"""The stream of bundles: shards go to their owners, the owners join them.

Bundles are exchanged in buckets, one collective each: every rank of a tensor-parallel group sends each owner the
shards it needs and receives those of its own bundles, so no rank receives a byte that it does not use. Every rank walks
the same plan in the same order and takes part in exactly the buckets of its own groups, so the order of collectives
agrees by construction. One bucket per group is in flight.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from amaxbridge.bridge.plan.export_plan import BundlePlan, Part
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.ranks import Axis, Ranks

BUCKET_BYTES = 16 * 2**20
_ALIGNMENT = 16  # bytes; a view of any dtype may start at a multiple of it


def stream_bundles(
    plan: Iterable[BundlePlan],
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    ranks: Ranks,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[Bundle]:
    """The bundles that this rank owns. Collective: exhaust it on every rank.

    Args:
        tensors: this rank's shards by global Megatron name; each is read when its bundle's turn comes.
        bucket_bytes: bytes that one rank contributes to one exchange, at least one bundle.
    """
    me = ranks.members(Axis.WORLD)[ranks.rank(Axis.WORLD)]
    buckets: dict[Axis, list[BundlePlan]] = {}
    for bundle in plan:
        if me not in bundle.group:
            continue
        if bundle.axis is None:
            yield join_bundle(bundle, tensors, config)
            continue
        bucket = buckets.setdefault(bundle.axis, [])
        bucket.append(bundle)
        if sum(_moved_bytes(each) for each in bucket) >= bucket_bytes:
            yield from _exchange(bucket, tensors, config, ranks, me)
            bucket.clear()
    for bucket in buckets.values():
        yield from _exchange(bucket, tensors, config, ranks, me)


def join_bundle(
    bundle: BundlePlan,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    shards: Mapping[str, list[Tensor]] | None = None,
) -> Bundle:
    """A bundle from its Megatron tensors: each from the ranks' `shards`, or whole from `tensors`."""
    moved = shards or {}
    joined: dict[str, Tensor] = {}
    for part in bundle.parts:
        joined |= part.mapping.join(moved.get(part.name) or [tensors[part.name].detach()], config)
    return Bundle.of(joined, bundle.key)


def _exchange(
    bucket: Sequence[BundlePlan], tensors: Mapping[str, Tensor], config: ModelConfig, ranks: Ranks, me: int
) -> Iterator[Bundle]:
    """One collective for all bundles of a bucket; then this rank joins those that it owns."""
    if not bucket:
        return
    axis, group = bucket[0].axis, bucket[0].group
    assert axis is not None
    sizes = [sum(_moved_bytes(bundle) for bundle in bucket if bundle.owner == member) for member in group]
    mine = [bundle for bundle in bucket if bundle.owner == me]
    data = _pack([bundle for member in group for bundle in bucket if bundle.owner == member], tensors)
    received = ranks.all_to_all(axis, data, sizes, [sizes[group.index(me)]] * len(group))
    del data
    at = 0
    for bundle in mine:
        shards = {}
        for part in bundle.moved_parts:
            shards[part.name] = [_unpack(data, at, part) for data in received]
            at += _aligned(part.shard.nbytes)
        yield join_bundle(bundle, tensors, config, shards)


def _pack(bundles: Sequence[BundlePlan], tensors: Mapping[str, Tensor]) -> Tensor:
    """This rank's shards of the bundles as bytes, each at an aligned offset."""
    parts = [part for bundle in bundles for part in bundle.moved_parts]
    tensor = tensors[parts[0].name]
    data = torch.zeros(sum(map(_moved_bytes, bundles)), dtype=torch.uint8, device=tensor.device)
    at = 0
    for number, part in enumerate(parts):
        tensor = tensors[part.name] if number else tensor
        _unpack(data, at, part).copy_(tensor.detach())
        at += _aligned(part.shard.nbytes)
    return data


def _unpack(data: Tensor, at: int, part: Part) -> Tensor:
    """One shard inside packed bytes, a view."""
    return data[at : at + part.shard.nbytes].view(part.shard.dtype).reshape(part.shard.shape)


def _moved_bytes(bundle: BundlePlan) -> int:
    return sum(_aligned(part.shard.nbytes) for part in bundle.moved_parts)


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGNMENT
