"""One amax for each fused group.

Serving engines run q/k/v, gate/up and the like as one GEMM with one global scale, so the members of a group must
be quantized with one weight amax and one input amax. They are combined as amax, with max, before any scale is
made: a maximum in one scale convention is a minimum in the other.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from export.quant_state import QuantState
from mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from mappings.errors import AmaxError, listing
from mappings.fused_groups import group_of, groups_among
from mappings.tensors import max_of


class GroupAmax(NamedTuple):
    """The amax that all members of a fused group share: fp32 scalars. `input` is None for weight-only schemes."""

    weight: Tensor
    input: Tensor | None


def share_amax(state: QuantState, modules: Iterable[str], *, inputs: bool) -> dict[str, GroupAmax]:
    """The shared amax of each module's fused group.

    Args:
        modules: the modules that will be quantized.
        inputs: whether the scheme needs input amax.

    Raises:
        AmaxError: an amax is missing, zero, negative, NaN or infinite; every one is named.
    """
    groups = groups_among(modules)
    _check(state, [name for group in groups for name in group.members], inputs=inputs)

    def largest(members: Iterable[str], amax: Callable[[str], Tensor | None]) -> Tensor:
        return max_of([value for member in members if (value := amax(member)) is not None])

    shared = {
        group.members: GroupAmax(
            largest(group.members, state.weight_amax), largest(group.members, state.input_amax) if inputs else None
        )
        for group in groups
    }
    return {member: amax for members, amax in shared.items() for member in members}


def split_groups(quantized: Iterable[str], others: Iterable[str]) -> list[str]:
    """One line for each fused group of which some members are quantized and others are not."""
    quantized, others = set(quantized), set(others)
    mixed = {group: None for module in quantized if not others.isdisjoint((group := group_of(module)).members)}
    return [
        f"{', '.join(m for m in group.members if m in quantized)} quantized, "
        f"{', '.join(m for m in group.members if m in others)} not"
        for group in mixed
    ]


def _check(state: QuantState, modules: Iterable[str], *, inputs: bool) -> None:
    suffixes = (WEIGHT_QUANTIZER, INPUT_QUANTIZER) if inputs else (WEIGHT_QUANTIZER,)
    problems = []
    for name in (module + suffix for module in modules for suffix in suffixes):
        amax = state.amax.get(name)
        if amax is None:
            problems.append(f"{name}: missing")
        elif not bool(((amax > 0) & torch.isfinite(amax)).all()):
            problems.append(f"{name}: {amax.flatten()[:4].tolist() if amax.numel() > 1 else amax.item()}")
    if problems:
        raise AmaxError(
            f"{len(problems)} amax are missing, zero, negative or not finite:{listing(problems)}\n"
            "Calibrate the model (mtq.calibrate) or train it with these quantizers enabled, then export again"
        )
