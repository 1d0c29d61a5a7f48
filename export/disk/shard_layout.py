"""The layout of the shard files, planned to the byte before anything is written.

It depends on names, shapes and dtypes alone, never on the ranks, so every topology writes the same bytes. A shard's
header is known from the start, so each rank writes its tensors at their offsets, in any order, and no rank holds a
shard in memory.

File format: safetensors (8 bytes little-endian header length, JSON header padded with spaces to a multiple of 8,
then the tensors). Inside a shard larger dtypes come first, so that every tensor is aligned to its item size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch

from amaxbridge.mappings.names import natural_key
from amaxbridge.mappings.tensors import TensorSpec

DEFAULT_SHARD_BYTES = 5_000_000_000
SINGLE_FILE = "model.safetensors"
"""The file name that readers find without an index."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file to be written: its name, its header, and the offset of each tensor."""

    file_name: str
    specs: Mapping[str, TensorSpec]
    header: bytes = field(repr=False)
    offsets: Mapping[str, int] = field(repr=False)  # from the beginning of the file

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs.values())

    @classmethod
    def of(cls, file_name: str, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> Self:
        """A file that holds these tensors, with `metadata` in its header."""
        ordered = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))  # stable: natural order inside
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        begins, end = {}, 0
        for name, spec in ordered.items():
            begins[name] = end
            end += spec.nbytes
            entries[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begins[name], end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return cls(file_name, ordered, header, {name: len(header) + begin for name, begin in begins.items()})


@dataclass(frozen=True)
class Layout:
    """All shards of a checkpoint."""

    shards: tuple[Shard, ...]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors: `metadata.total_size` of the index."""
        return sum(spec.nbytes for shard in self.shards for spec in shard.specs.values())

    @classmethod
    def of(cls, files: Mapping[str, Mapping[str, TensorSpec]]) -> "Layout":
        """The layout of these files: file name → the tensors in it."""
        return cls(tuple(Shard.of(name, specs) for name, specs in files.items()))

    @cached_property
    def places(self) -> dict[str, tuple[Shard, int]]:
        """Tensor name → its shard, and its offset in the file."""
        return {name: (shard, at) for shard in self.shards for name, at in shard.offsets.items()}

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → file name, in natural order."""
        pairs = [(name, shard.file_name) for shard in self.shards for name in shard.specs]
        return dict(sorted(pairs, key=lambda pair: natural_key(pair[0])))


def plan_layout(specs: Mapping[str, TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Layout:
    """Packs tensors, in natural order of their names, into shards of `max_shard_bytes` or one larger tensor."""
    batches: list[dict[str, TensorSpec]] = [{}]
    room = max_shard_bytes
    for name in sorted(specs, key=natural_key):
        if batches[-1] and specs[name].nbytes > room:
            batches.append({})
            room = max_shard_bytes
        batches[-1][name] = specs[name]
        room -= specs[name].nbytes
    total = len(batches)
    if total == 1:
        return Layout.of({SINGLE_FILE: batches[0]})
    names = (f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1))
    return Layout.of(dict(zip(names, batches, strict=True)))
