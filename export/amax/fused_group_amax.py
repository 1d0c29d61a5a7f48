"""One amax for each fused group.

Serving engines run q/k/v, gate/up and other fused groups as one GEMM with one global scale, so the members of a group
must be quantized with one weight amax and one input amax. They are combined as amax, with max, before any scale is
made: a maximum in one scale convention is a minimum in the other.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import AmaxError, UsageError, listing
from amaxbridge.mappings.fused_groups import FusedGroup, groups_among, layer_of
from amaxbridge.mappings.tensors import max_of

_SHOWN = 4  # members of a group in a message


class MissingAmax(StrEnum):
    """What to do about an amax that is missing, zero, negative or not finite."""

    ERROR = "error"
    FROM_WEIGHTS = "from_weights"  # a weight's from the weights of its fused group; an input's stays an error
    GROUP_MAX = "group_max"  # from the members of its fused group that have one


class MixedGroups(StrEnum):
    """What to do about modules that engines run as one layer, and that have several formats."""

    ERROR = "error"
    UNQUANTIZED = "unquantized"  # all members of such a group are written in 16 bits


def missing_policy(name: str) -> MissingAmax:
    """Returns the policy of this name.

    Raises:
        UsageError: unknown name. The message lists the known ones.
    """
    return _policy(MissingAmax, "missing_amax", name)


def mixed_policy(name: str) -> MixedGroups:
    """Returns the policy of this name.

    Raises:
        UsageError: unknown name. The message lists the known ones.
    """
    return _policy(MixedGroups, "mixed_groups", name)


def _policy[Policy: StrEnum](kind: type[Policy], option: str, name: str) -> Policy:
    if name not in list(kind):
        raise UsageError(f"unknown policy {option}={name}; known: {', '.join(kind)}")
    return kind(name)


class GroupAmax(NamedTuple):
    """The amax that all members of a fused group share: fp32 scalars.

    `weight` is None if it comes from the weights themselves, `input` is None for weight-only schemes. What training
    calibrated is written in ModelOpt's arithmetic, everything else in compressed-tensors'.
    """

    weight: Tensor | None
    input: Tensor | None
    arithmetic: Arithmetic = Arithmetic.MODELOPT


class StackAmax(NamedTuple):
    """As `GroupAmax`, for `length` weights that are quantized at once: fp32 `[length]` on the CPU."""

    length: int
    weight: Tensor | None
    input: Tensor | None
    arithmetic: Arithmetic = Arithmetic.MODELOPT

    def each(self) -> list[GroupAmax]:
        """The amax of each weight's group."""
        weights = [None] * self.length if self.weight is None else self.weight.unbind()
        inputs = [None] * self.length if self.input is None else self.input.unbind()
        return [GroupAmax(*amax, self.arithmetic) for amax in zip(weights, inputs, strict=True)]


class BlockAmax(NamedTuple):
    """The amax of each block of a weight, `[blocks down, blocks across]`, as training kept them.

    `stored` makes the stored scales. `chosen` is None, or makes the scales under which codes are chosen, where training
    learned both (Dual-LSQ), or where the rows are multiplied afterwards.
    """

    stored: Tensor
    chosen: Tensor | None = None

    def rows(self, first: int, end: int) -> "BlockAmax":
        """That of some rows of blocks."""
        return BlockAmax(self.stored[first:end], None if self.chosen is None else self.chosen[first:end])

    def times(self, factors: Tensor) -> "BlockAmax":
        """That of the rows of a weight multiplied by these factors, `[rows]`, with the codes that they have now."""
        return BlockAmax(self.stored * factors[:, None], self.stored if self.chosen is None else self.chosen)


DATA_FREE = GroupAmax(None, None, Arithmetic.COMPRESSED_TENSORS)
"""The amax of a group that was never calibrated."""


@dataclass(slots=True)
class SharedAmax:
    """The shared amax by module, and the amax that were filled: quantizer name → what filled it.

    `made_of` has, by the first module of a group, the buffers whose maximum its amax are: of weights, of inputs.
    """

    by_module: dict[str, GroupAmax] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    made_of: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)


def share_amax(
    state: QuantState, weights: Collection[str], inputs: Collection[str], *, missing: MissingAmax = MissingAmax.ERROR
) -> SharedAmax:
    """The shared amax of each module's fused group.

    Args:
        state: the amax of single quantizers.
        weights: the modules that need a weight amax.
        inputs: the modules that need an input amax.
        missing: what to do about an unusable amax.

    Raises:
        AmaxError: an amax is missing, zero, negative, NaN or infinite, and the policy does not fill it; all are named.
    """
    shared, problems = SharedAmax(), list[str]()

    def combine(group: FusedGroup, suffix: str, name_of: Callable[[str], str]) -> tuple[str, ...]:
        found = {member: state.amax.get(name_of(member)) for member in group.members}
        good = tuple(name_of(member) for member, value in found.items() if _usable(value))
        bad = {member + suffix: _shown(value) for member, value in found.items() if not _usable(value)}
        if missing == MissingAmax.FROM_WEIGHTS and suffix == WEIGHT_QUANTIZER and bad:
            shared.filled |= dict.fromkeys(bad, "the weights")
            return ()
        if bad and missing == MissingAmax.GROUP_MAX and good:
            shared.filled |= dict.fromkeys(bad, "the largest of its fused group")
        else:
            problems.extend(f"{name}: {value}" for name, value in bad.items())
        return good

    for group in groups_among([*weights, *inputs]):
        of_weights = combine(group, WEIGHT_QUANTIZER, state.weight_amax_name) if group.primary in weights else ()
        of_inputs = combine(group, INPUT_QUANTIZER, _input_amax_name) if group.primary in inputs else ()
        made_of = shared.made_of[group.primary] = of_weights, of_inputs
        largest = [max_of([state.amax[name] for name in names]) if names else None for names in made_of]
        shared.by_module |= dict.fromkeys(group.members, GroupAmax(largest[0], largest[1]))
    if problems:
        raise AmaxError(
            f"{len(problems)} amax are missing, zero, negative or not finite:{listing(problems)}\n"
            "Calibrate the model (mtq.calibrate) or train it with these quantizers enabled, then export again; "
            "missing_amax=from_weights fills weight amax from the weights; input amax come from data, or with "
            "group_max from the same fused group"
        )
    return shared


@dataclass(frozen=True, slots=True)
class MixedGroup:
    """Modules that engines run as one layer, and that are treated differently.

    Args:
        treatment: module → its treatment, in a few words.
    """

    treatment: Mapping[str, str]

    def __str__(self) -> str:
        words = dict.fromkeys(self.treatment.values())
        members = ([module for module, its in self.treatment.items() if its == word] for word in words)
        return "; ".join(
            f"{', '.join(each[:_SHOWN])}{f' and {len(each) - _SHOWN} more' if len(each) > _SHOWN else ''} {word}"
            for word, each in zip(words, members, strict=True)
        )


def mixed_groups(treatment: Mapping[str, str]) -> list[MixedGroup]:
    """The groups of modules that engines run as one layer, and whose members are treated differently.

    Args:
        treatment: module → its treatment, in a few words.
    """
    groups: dict[str, dict[str, str]] = {}
    for module, word in treatment.items():
        groups.setdefault(layer_of(module), {})[module] = word
    return [MixedGroup(group) for group in groups.values() if len(set(group.values())) > 1]


def _input_amax_name(module: str) -> str:
    return module + INPUT_QUANTIZER


def _usable(amax: Tensor | None) -> bool:
    return amax is not None and 0 < amax.item() < math.inf


def _shown(amax: Tensor | None) -> str:
    return "missing" if amax is None else str(amax.item())
