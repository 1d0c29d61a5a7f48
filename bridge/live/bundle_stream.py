"""The stream of bundles: shards go to their owners, the owners join them.

Bundles are exchanged in buckets, one collective each: every rank of a tensor-parallel group sends each owner the
shards it needs and receives those of its own bundles, so no rank receives a byte that it does not use. Every rank walks
the same plan in the same order and takes part in exactly the buckets of its own groups, so the order of collectives
agrees by construction. One bucket per group is in flight.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.bridge.plan.export_plan import BundlePlan, Part
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.ranks import Axis, Ranks

BUCKET_BYTES = 16 * 2**20
_ALIGNMENT = 16  # bytes; a view of any dtype may start at a multiple of it

type Shards = dict[str, list[Tensor]]
"""Megatron name → the shards of all ranks, in rank order."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Bundles of one rank that are made together.

    Args:
        axis: the axis along which their shards move, in one collective; None if the rank has its parts whole.
    """

    bundles: tuple[BundlePlan, ...]
    axis: Axis | None


def in_buckets(
    plan: Iterable[BundlePlan], ranks: Ranks, *, bucket_bytes: int, whole_bytes: int = 1
) -> Iterator[Bucket]:
    """The bundles that this rank takes part in, in buckets.

    Args:
        bucket_bytes: bytes that one rank contributes to one exchange, at least one bundle.
        whole_bytes: as many of bundles whose shards do not move, at least one bundle.
    """
    me = world_rank_of(ranks)
    filling: dict[Axis | None, list[BundlePlan]] = {}
    sizes = Counter[Axis | None]()
    for bundle in plan:
        if me not in bundle.group:
            continue
        bucket = filling.setdefault(bundle.axis, [])
        bucket.append(bundle)
        sizes[bundle.axis] += _held_bytes(bundle) if bundle.axis is None else _moved_bytes(bundle)
        if sizes[bundle.axis] >= (whole_bytes if bundle.axis is None else bucket_bytes):
            yield Bucket(tuple(bucket), bundle.axis)
            del filling[bundle.axis], sizes[bundle.axis]
    for axis, bucket in filling.items():
        yield Bucket(tuple(bucket), axis)


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
    me = world_rank_of(ranks)
    for bucket in in_buckets(plan, ranks, bucket_bytes=bucket_bytes):
        shards: Shards = {}
        if bucket.axis is not None:
            shards = Exchange(bucket, ranks).begin(tensors)()
        for bundle in bucket.bundles:
            if bundle.owner == me:
                yield join_bundle(bundle, tensors, config, shards)


def join_bundle(
    bundle: BundlePlan,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    shards: Mapping[str, list[Tensor]] | None = None,
) -> Bundle:
    """A bundle from its Megatron tensors: each from the ranks' `shards`, or whole from `tensors`."""
    return Bundle.of(joined_tensors(bundle, tensors, config, shards or {}), bundle.key)


def joined_tensors(
    bundle: BundlePlan, tensors: Mapping[str, Tensor], config: ModelConfig, shards: Mapping[str, list[Tensor]]
) -> dict[str, Tensor]:
    """All Hugging Face tensors of a bundle, quantizer state included."""
    joined: dict[str, Tensor] = {}
    for part in bundle.parts:
        joined |= part.mapping.join(shards.get(part.name) or [tensors[part.name].detach()], config)
    return joined


class Exchange:
    """The collective of one bucket: what this rank sends to the owners, and receives as one of them.

    It is planned once, and can be made as often as needed, in the same memory.
    """

    def __init__(self, bucket: Bucket, ranks: Ranks) -> None:
        assert bucket.axis is not None, "nothing moves"
        self._axis, self._ranks = bucket.axis, ranks
        group, me = bucket.bundles[0].group, world_rank_of(ranks)
        by_owner = [[bundle for bundle in bucket.bundles if bundle.owner == member] for member in group]
        self._sent = [sum(map(_moved_bytes, bundles)) for bundles in by_owner]
        self._received = [self._sent[group.index(me)]] * len(group)
        self._sends = _places(bundle for bundles in by_owner for bundle in bundles)
        self._takes = _places(by_owner[group.index(me)])

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends, its own share included."""
        return sum(self._sent)

    @property
    def received_bytes(self) -> int:
        """Bytes that this rank receives, its own share included."""
        return sum(self._received)

    def begin(
        self, tensors: Mapping[str, Tensor], send: Tensor | None = None, receive: Tensor | None = None
    ) -> Callable[[], Shards]:
        """Begins the collective, and returns what waits for its end and returns the shards of this rank's bundles.

        Args:
            tensors: this rank's shards.
            send, receive: memory of at least so many bytes; None for new.
        """
        parts = [part for part, _ in self._sends]
        first = tensors[parts[0].name]
        shards = [first, *(tensors[part.name] for part in parts[1:])]
        if send is None:
            send = torch.zeros(self.sent_bytes, dtype=torch.uint8, device=first.device)
        places = [_view(send, at, part) for part, at in self._sends]
        torch._foreach_copy_(places, [shard.detach() for shard in shards])
        data = send[: self.sent_bytes]
        wait = self._ranks.begin_all_to_all(self._axis, data, self._sent, self._received, receive)

        def received() -> Shards:
            slices = wait()
            return {part.name: [_view(data, at, part) for data in slices] for part, at in self._takes}

        return received


def world_rank_of(ranks: Ranks) -> int:
    """The number by which plans name this rank."""
    return ranks.members(Axis.WORLD)[ranks.rank(Axis.WORLD)]


def _places(bundles: Iterable[BundlePlan]) -> Sequence[tuple[Part, int]]:
    """Each moved part, and the aligned offset at which it lies in packed bytes."""
    places, at = list[tuple[Part, int]](), 0
    for part in (part for bundle in bundles for part in bundle.moved_parts):
        places.append((part, at))
        at += _aligned(part.shard.nbytes)
    return places


def _view(data: Tensor, at: int, part: Part) -> Tensor:
    """One shard inside packed bytes."""
    return data[at : at + part.shard.nbytes].view(part.shard.dtype).reshape(part.shard.shape)


def _moved_bytes(bundle: BundlePlan) -> int:
    return sum(_aligned(part.shard.nbytes) for part in bundle.moved_parts)


def _held_bytes(bundle: BundlePlan) -> int:
    return sum(part.shard.nbytes for part in bundle.parts)


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGNMENT
