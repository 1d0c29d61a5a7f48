"""How strongly the adapters of a live model act, as their modules say.

Megatron-Bridge keeps `alpha` and `dim` on the adapter, and on the linear that it wraps, if it acts at all; ModelOpt
keeps `scale` and `enable` on the linear. Nothing here imports either.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from amaxbridge.bridge.live.model_walk import walk_names
from amaxbridge.mappings.adapters import AdapterTensor, Side, adapter_tensor
from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.ranks import Axis, Ranks


@dataclass(frozen=True, slots=True)
class LiveScales:
    """What products of adapters are multiplied by, by the names of adapters without numbers of experts or with them.

    Args:
        by_adapter: adapter → scale.
    """

    by_adapter: Mapping[str, float]

    def scale_of(self, tensor: AdapterTensor, rank: int, *, has_lengths: bool) -> float:
        """What the product of an adapter is multiplied by.

        Raises:
            UsageError: no module of any rank says it.
        """
        del rank, has_lengths
        for name in (tensor.adapter, tensor.of_all_experts):
            if name in self.by_adapter:
                return self.by_adapter[name]
        raise UsageError(f"{tensor.adapter}: no module of any rank says how strongly it acts")


def live_scales(
    chunks: Sequence[nn.Module], ranks: Ranks, alpha: float | None, spelling: Callable[[str], str] = canonical
) -> LiveScales:
    """The scales of all ranks' adapters. Collective.

    Args:
        alpha: what the user says, to be compared.
        spelling: global Megatron name → the mappings' name.

    Raises:
        UsageError: adapters do not act, say nothing, or contradict `alpha`; all are named.
    """
    scales, problems = dict[str, float](), list[str]()
    for chunk in chunks:
        modules: Mapping[str, Any] = dict(chunk.named_modules())
        for local_name, global_name in walk_names(chunk):
            tensor = adapter_tensor(spelling(global_name))
            if tensor is None or tensor.side is not Side.A:
                continue
            scale, rank, acts = _of_module(modules, local_name, tensor)
            if scale is None or rank is None:
                problems.append(f"{tensor.adapter}: its module says no alpha and rank, or no scale")
            elif not acts:
                problems.append(f"{tensor.adapter}: is disabled, so the model computes without it")
            elif alpha is not None and alpha / rank != scale:
                problems.append(f"{tensor.adapter}: has alpha {scale * rank:g}, not adapter.alpha={alpha:g}")
            else:
                scales[tensor.adapter] = scale
    reports = ranks.all_gather_object(Axis.WORLD, (scales, problems))
    found = list(dict.fromkeys(each for _, lines in reports for each in lines))
    if found:
        raise UsageError(f"{len(found)} adapters cannot be exported as they are:{listing(found)}")
    return LiveScales({name: scale for of_rank, _ in reports for name, scale in of_rank.items()})


def _of_module(
    modules: Mapping[str, Any], local_name: str, tensor: AdapterTensor
) -> tuple[float | None, int | None, bool]:
    """The scale of an adapter, its rank, and if it acts."""
    if tensor.label:
        linear = modules[local_name.rpartition(f".lora_a_{tensor.label}.")[0]]
        said = getattr(linear, "_lora_adapters", {}).get(tensor.label, {})
        return said.get("scale"), said.get("rank"), bool(said.get("enable", False))
    adapter = modules[local_name.rpartition(".linear_in.")[0]]
    wrapper = modules[local_name.partition(".adapter.")[0]]
    alpha, rank = getattr(adapter, "alpha", None), getattr(adapter, "dim", None)
    if alpha is None or not rank:
        return None, None, True
    return alpha / rank, rank, bool(getattr(wrapper, "_adapter_enabled", True))
