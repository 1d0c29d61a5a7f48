"""The place of a module in the model: layer, projection, expert, and the part that its size counts towards."""

import re
from dataclasses import dataclass

from amaxbridge.mappings.names import is_routed_expert, kind_of

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
    """The place of a module.

    Args:
        pattern: name without numbers.
        projection: name without numbers within its layer: `mlp.experts.*.up_proj`.
        layer: layer number; None outside the layers.
        expert: expert number; None outside the routed experts.
    """

    pattern: str
    projection: str
    layer: int | None
    expert: int | None

    @property
    def part(self) -> str:
        """The part of the model that the module's size counts towards."""
        return next((part for part, found in _PARTS if found.match(self.pattern)), "norms and the rest")

    @property
    def short(self) -> str:
        """The last word of the projection: `up_proj`."""
        return self.projection.rpartition(".")[2]


def place_of(module: str) -> Place:
    """Reads the place from a module's name."""
    found = _LAYER.fullmatch(module)
    inside = found[3] if found else module
    expert = _EXPERT.fullmatch(inside) if is_routed_expert(module) else None
    return Place(
        kind_of(module),
        kind_of(inside),
        int(found[2]) if found else None,
        int(expert[2]) if expert else None,
    )
