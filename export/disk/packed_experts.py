"""Packed experts: all experts of a layer in one tensor, where engines load a 2-D weight for each expert.

    experts.{e}.gate_proj.weight, experts.{e}.up_proj.weight   [ffn, hidden]   in experts.gate_up_proj
    experts.{e}.down_proj.weight                               [hidden, ffn]   in experts.down_proj

The rest of the program knows experts one by one. Reading cuts them out of a packed tensor, also out of the MXFP4 that
GPT-OSS is published in. `ExpertPacker` is the inverse, for families whose unquantized files hold packed experts only:
the rank that has an expert writes it into its part of the packed tensor.

`mappings.family.PackedExperts` describes the layouts.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from amaxbridge.export.disk.row_chunks import Written
from amaxbridge.export.kernels import e2m1, mx
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.family import PackedExperts
from amaxbridge.mappings.tensors import TensorSpec

_PACKED = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(?:\.weight|(_bias))?")
_SINGLE = re.compile(r"(.*\bexperts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_HALVES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None)}
_NAMES = PackedExperts().names


@dataclass(frozen=True, slots=True)
class PackedSource:
    """Where one expert's tensor lies in a packed tensor.

    Args:
        name: name of the packed tensor.
        expert: index along its first dim.
        half: 0 for gate, 1 for up, None for the whole part.
        layout: layout of the packed tensor.
    """

    name: str
    expert: int
    half: int | None
    layout: PackedExperts

    def cut(self, part: Tensor) -> Tensor:
        """The expert's tensor, `[out, in]` or a bias `[out]`, from the expert's part of the packed tensor."""
        rows = part.t() if self.layout.transposed else part
        if self.half is None:
            return rows
        if self.layout.interleaved:
            return rows[self.half :: 2]
        length = _half(rows, self.name)
        return rows[self.half * length : (self.half + 1) * length]

    def cut_mxfp4(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """The same from the expert's part in MXFP4, whose outputs come first in every layout; exact in bf16.

        Args:
            blocks: uint8 `[out, in/32, 16]`, two e2m1 values a byte, the even column in the low nibble.
            scales: uint8 `[out, in/32]`, a block's exponent plus 127.
        """
        rows = mx.dequantize(e2m1.unpack(blocks.flatten(1)), scales)
        return self.cut(rows.t() if self.layout.transposed else rows)


type FindPacked = Callable[[str], PackedSource | None]
"""Where an expert's weight or bias lies in a packed tensor; None for other names."""


def found_in(layout: PackedExperts | None) -> FindPacked:
    """Finds experts by the names that most models use, in this layout."""
    return partial(packed_source, layout=layout or PackedExperts())


def packed_source(name: str, layout: PackedExperts) -> PackedSource | None:
    """Where an expert's weight or bias lies in a packed tensor; None for other names."""
    found = _SINGLE.fullmatch(name)
    if found is None:
        return None
    packed, half = _HALVES[found[3]]
    name = f"{found[1]}.{packed}{'_bias' * (found[4] == 'bias')}"
    return PackedSource(_respelled(name, _NAMES, layout.names), int(found[2]), half, layout)


def _respelled(name: str, names: tuple[str, str], others: tuple[str, str]) -> str:
    """A packed tensor's name with another spelling of its end; unchanged if it does not end so."""
    for one, other in zip(names, others, strict=True):
        if name.endswith(f".{one}"):
            return name.removesuffix(one) + other
    return name


def sources_in(name: str, shape: tuple[int, ...], layout: PackedExperts) -> dict[str, PackedSource]:
    """The single experts in a tensor: name → where it lies; empty if the tensor packs no experts.

    Raises:
        MappingError: the outputs do not divide into gate and up; names tensor and shape.
    """
    found = _PACKED.fullmatch(_respelled(name, layout.names, _NAMES))
    if found is None or len(shape) != (2 if found[3] else 3):
        return {}
    kind = "bias" if found[3] else "weight"
    halves = [(part, half) for part, (packed, half) in _HALVES.items() if packed == found[2]]
    outputs = shape[-1] if layout.transposed or found[3] else shape[1]
    if len(halves) == 2 and outputs % 2:
        raise MappingError(f"{name}: {list(shape)} does not divide into gate and up of {shape[0]} experts")
    return {
        f"{found[1]}.{expert}.{part}.{kind}": PackedSource(name, expert, half, layout)
        for expert in range(shape[0])
        for part, half in halves
    }


class ExpertPacker:
    """Writes experts into packed tensors, a row for each; other tensors pass unchanged.

    Args:
        specs: everything that will be packed or passed, by name.
        layout: layout of the packed tensors; None to pack nothing.

    Raises:
        MappingError: experts of one layer differ in shape, or some are missing.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], layout: PackedExperts | None) -> None:
        self._layout = layout
        self.specs: dict[str, TensorSpec] = {}
        parts: dict[str, dict[int, TensorSpec]] = {}
        for name, part, tensor in self.pack({name: spec.meta() for name, spec in specs.items()}):
            if name in specs:
                self.specs[name] = specs[name]
            else:
                parts.setdefault(name, {})[part] = TensorSpec.of(tensor)
        for name, experts in parts.items():
            first, *others = set(experts.values())
            if others or set(experts) != set(range(len(experts))):
                shapes = ", ".join(map(str, (first, *others)))
                raise MappingError(
                    f"{name} cannot be packed from experts {sorted(experts)} of {shapes}: "
                    "all are needed, in one shape and dtype"
                )
            self.specs[name] = TensorSpec((len(experts), *first.shape), first.dtype)

    def pack(self, tensors: Mapping[str, Tensor]) -> Iterator[Written]:
        """What is written for these tensors; gate and up of an expert come in the same call."""
        for name, tensor in tensors.items():
            source = packed_source(name, self._layout) if self._layout else None
            if source is None:
                yield Written(name, 0, tensor)
            elif source.half is None:
                yield self._part(source, tensor)
            elif source.half == 0:
                yield self._part(source, tensor, tensors[name.replace(".gate_proj.", ".up_proj.")])

    def _part(self, source: PackedSource, *halves: Tensor) -> Written:
        """The inverse of `PackedSource.cut`, on all halves at once."""
        rows = torch.stack(halves, dim=1).flatten(0, 1) if source.layout.interleaved else torch.cat(halves)
        return Written(source.name, source.expert, rows.t() if source.layout.transposed else rows)


def split_fused_moe_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits packed experts into 2-D weights, `{e}.gate_proj.weight` and so on; other tensors are unchanged.

    Raises:
        ValueError: a packed gate_up_proj whose second dim is odd; names tensor and shape.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = sources_in(name, tuple(tensor.shape), PackedExperts())
        split |= {single: source.cut(tensor[source.expert]) for single, source in found.items()} or {name: tensor}
    return split


def _half(expert: Tensor, name: str) -> int:
    if expert.shape[0] % 2:
        raise ValueError(f"{name}: {list(expert.shape)} for each expert does not divide into gate and up")
    return expert.shape[0] // 2
