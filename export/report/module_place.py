"""Where a module stands in the model: layer, projection, expert, and the part whose size it counts to."""

import re
from dataclasses import dataclass

from amaxbridge.mappings.names import is_routed_expert

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER = re.compile(r"(.*?\blayers\.)(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)\.(.*)")
_PARTS = (
    ("routed experts", re.compile(r".*\bexperts\.")),
    ("embeddings and head", re.compile(r".*(embed|wte|lm_head|output_layer)")),
    ("vision and audio", re.compile(r".*\b(vision|visual|audio)")),
    ("attention", re.compile(r".*\.(self_attn|attention|attn|linear_attn)\b")),
    ("state-space mixers", re.compile(r".*\.(mixer|mamba)\b")),
    ("routers", re.compile(r".*\.(gate|router|shared_expert_gate)$")),
    ("MLP", re.compile(r".*\.(mlp|feed_forward|ffn|shared_expert\w*)\b")),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module stands.

    Args:
        pattern: its name without numbers.
        projection: the same within its layer: `mlp.experts.*.up_proj`.
        layer: number; None outside the layers.
        expert: number; None outside the routed experts.
    """

    pattern: str
    projection: str
    layer: int | None
    expert: int | None

    @property
    def part(self) -> str:
        """The part of the model that it counts to."""
        return next((part for part, found in _PARTS if found.match(self.pattern)), "norms and the rest")

    @property
    def short(self) -> str:
        """The projection alone: `up_proj`."""
        return self.projection.rpartition(".")[2]


def place_of(module: str) -> Place:
    """The place that a module's name says."""
    found = _LAYER.fullmatch(module)
    inside = found[3] if found else module
    expert = _EXPERT.fullmatch(inside) if is_routed_expert(module) else None
    return Place(
        _NUMBER.sub("*", module),
        _NUMBER.sub("*", inside),
        int(found[2]) if found else None,
        int(expert[2]) if expert else None,
    )
