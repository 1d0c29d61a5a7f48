"""A Megatron mesh that need not exist: which ranks form a group, and which parameters each rank holds."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import is_routed_expert
from amaxbridge.mappings.ranks import Axis

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.linear_fc[12]\.(?:weight|bias)(\d+)$")


@dataclass(frozen=True)
class Mesh:
    """Sizes of a mesh. Ranks are numbered as in Megatron: TP fastest, then DP, then PP; experts ETP, EP, DP, PP.

    Args:
        vpp: model chunks of each pipeline stage.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1

    def __post_init__(self) -> None:
        if (self.tp * self.dp) % (self.ep * self.etp):
            raise ValueError(f"EP×ETP must divide TP×DP: {self}")

    @classmethod
    def smallest(
        cls, *, tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, etp: int | None = None
    ) -> "Mesh":
        """The mesh with these sizes and the fewest ranks. `etp`: None for `tp`."""
        etp = etp or tp
        return cls(tp=tp, pp=pp, dp=math.lcm(tp, ep * etp) // tp, ep=ep, etp=etp, vpp=vpp or 1)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def groups(self) -> dict[Axis, list[list[int]]]:
        """The groups of world ranks along each axis."""
        ranks = range(self.world)
        stage = self.tp * self.dp
        keys: dict[Axis, Callable[[int], Any]] = {
            Axis.TP: lambda rank: rank // self.tp,
            Axis.DP: lambda rank: (rank // stage, rank % self.tp),
            Axis.PP: lambda rank: rank % stage,
            Axis.ETP: lambda rank: rank // self.etp,
            Axis.EP: lambda rank: (rank // (self.etp * self.ep), rank % self.etp),
        }
        grouped: dict[Axis, dict[Any, list[int]]] = {axis: {} for axis in keys}
        for axis, key in keys.items():
            for rank in ranks:
                grouped[axis].setdefault(key(rank), []).append(rank)
        return {axis: list(groups.values()) for axis, groups in grouped.items()}

    def place(self, rank: int) -> tuple[int, int]:
        """The pipeline stage and expert-parallel position of a rank. Ranks of one place hold the same names."""
        return rank // (self.tp * self.dp), rank // self.etp % self.ep

    def size(self, mapping: MegatronParamMapping) -> int:
        """Number of ranks that a parameter is sharded over."""
        return self.etp if mapping.axis == Axis.ETP else self.tp

    def held(self, names: Sequence[str]) -> Mapping[tuple[int, int], list[str]]:
        """The parameters that the ranks of each place hold.

        Layers are divided evenly between stages. The first stage has the embedding, the last has the rest.
        """
        layers = [int(found[1]) for name in names if (found := _LAYER.match(name))]
        chunks, count = self.pp * self.vpp, max(layers, default=0) + 1
        experts = 1 + max((int(found[1]) for name in names if (found := _EXPERT.search(name))), default=0)
        places: dict[tuple[int, int], list[str]] = {self.place(rank): [] for rank in range(self.world)}
        for name in names:
            layer, expert = _LAYER.match(name), _EXPERT.search(name) if is_routed_expert(name) else None
            stage = self.pp - 1
            if layer:
                stage = int(layer[1]) * chunks // count % self.pp
            elif name.startswith("embedding."):
                stage = 0
            positions = [int(expert[1]) * self.ep // experts] if expert else range(self.ep)
            for position in positions:
                places[stage, position].append(name)
        return places
