"""Hugging Face's packed experts: all experts of a layer as one 3-D tensor, taken apart into the 2-D names engines load.

experts.gate_up_proj   [experts, 2 · ffn, hidden]   gate rows, then up rows
experts.down_proj      [experts, hidden, ffn]
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_PACKED = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(?:\.weight)?")
_SINGLE = re.compile(r"(.*\bexperts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_HALVES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None)}


@dataclass(frozen=True, slots=True)
class PackedSource:
    """Where one expert's weight lies in a packed tensor.

    Args:
        name: of the packed tensor.
        expert: index along its first dim.
        half: 0 for gate, 1 for up, None for all of it.
    """

    name: str
    expert: int
    half: int | None

    def cut(self, expert: Tensor) -> Tensor:
        """The weight, from the 2-D slice of its expert."""
        if self.half is None:
            return expert
        rows = _half(expert, self.name)
        return expert[self.half * rows : (self.half + 1) * rows]


def packed_source(name: str) -> PackedSource | None:
    """The packed tensor that would hold an expert's 2-D weight, None for other names."""
    found = _SINGLE.fullmatch(name)
    if found is None:
        return None
    packed, half = _HALVES[found[3]]
    return PackedSource(f"{found[1]}.{packed}", int(found[2]), half)


def split_fused_moe_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed experts as 2-D weights of each expert, `{e}.gate_proj.weight` and so on; other tensors unchanged.

    Raises:
        ValueError: a packed gate_up_proj whose second dim is odd; names tensor and shape.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _PACKED.fullmatch(name)
        if found is None or tensor.ndim != 3:
            split[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            if found[2] == "down_proj":
                split[f"{found[1]}.{expert}.down_proj.weight"] = weight
            else:
                rows = _half(weight, name)
                split[f"{found[1]}.{expert}.gate_proj.weight"] = weight[:rows]
                split[f"{found[1]}.{expert}.up_proj.weight"] = weight[rows:]
    return split


def _half(expert: Tensor, name: str) -> int:
    if expert.shape[0] % 2:
        raise ValueError(f"{name}: {list(expert.shape)} for each expert does not divide into gate and up")
    return expert.shape[0] // 2
