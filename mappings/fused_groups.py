"""The one table of fused groups: Hugging Face modules that a serving engine runs as one GEMM.

The members of a group must share their global scales, for weights and for inputs: an engine keeps one scale for
the whole GEMM and uses it for every member (vLLM: the maximum of the divisors, and the gate's for both halves of
an expert). Every part of the program that needs groups reads this table.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

FUSED_PROJECTIONS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),  # dense, shared expert and each routed expert
    ("w1", "w3"),  # the same, as Mixtral names it
    ("q_a_proj", "kv_a_proj_with_mqa"),  # multi-head latent attention
    ("in_proj_qkv", "in_proj_z"),  # gated delta net
    ("in_proj_b", "in_proj_a"),
)

_EXPERT = re.compile(r"(\.experts\.)\d+(\.)")
_GROUP_OF = {projection: group for group in FUSED_PROJECTIONS for projection in group}


@dataclass(frozen=True, slots=True)
class FusedGroup:
    """Modules that share global scales. `members` are all names in the table, even those that the model lacks."""

    members: tuple[str, ...]

    @property
    def primary(self) -> str:
        """The member that stands for the group: q, gate, w1."""
        return self.members[0]


def group_of(module: str) -> FusedGroup:
    """The group that a Hugging Face module belongs to; a module that is not fused is alone in its group."""
    parent, dot, projection = module.rpartition(".")
    return FusedGroup(tuple(parent + dot + member for member in _GROUP_OF.get(projection, (projection,))))


def layer_of(module: str) -> str:
    """A name that is equal for modules that an engine runs as one layer, in one format.

    These are the members of a fused group; and the same projection of all routed experts of a layer, for which engines
    ask the first expert's format.
    """
    return _EXPERT.sub(r"\1*\2", group_of(module).primary)


def groups_among(modules: Iterable[str]) -> list[FusedGroup]:
    """The groups that `modules` form, reduced to the modules given, in the order of their first member."""
    present = dict.fromkeys(modules)
    groups = dict.fromkeys(group_of(module) for module in present)
    return [FusedGroup(tuple(member for member in group.members if member in present)) for group in groups]
