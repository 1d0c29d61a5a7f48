"""The stream of bundles: shards go to their owner, the owner joins them.

Every rank walks the same plan in the same order and takes part in exactly the gathers of its own group, so the
order of collectives agrees by construction. One bundle is in flight at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from bridge.plan import BundlePlan
from mappings.ranks import Axis, Ranks


def stream_bundles(
    plan: Iterable[BundlePlan], tensors: Mapping[str, Tensor], config: Any, ranks: Ranks
) -> Iterator[dict[str, Tensor]]:
    """The bundles that this rank owns, each as {Hugging Face name: tensor}. Collective: exhaust it on every rank.

    Args:
        tensors: this rank's shards by global Megatron name.
    """
    me = ranks.members(Axis.WORLD)[ranks.rank(Axis.WORLD)]
    for bundle in plan:
        if me not in bundle.group:
            continue
        mapping = bundle.mapping
        shards: list[Tensor] | None = [tensors[mapping.megatron_param].detach()]
        if len(bundle.group) > 1:
            shards = ranks.gather(mapping.axis, tensors[mapping.megatron_param], bundle.group.index(bundle.owner))
        if shards is not None:
            yield mapping.join(shards, config)
