"""What a repair changes, as data: nothing is written, and no tensor is read, before it is known.

An `Edits` says what stands in the place of config.json, of the index and of single tensors. A tensor is replaced by one
of the kinds below, each of which is read in parts, as the tensor in the file is. All others are carried over.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from amaxbridge.export.disk.row_chunks import Part
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.kernels.common_scale import Moved
from amaxbridge.mappings.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Given(StoredTensor):
    """A small tensor that a repair computed, for a place in a file."""

    tensor: Tensor

    @classmethod
    def of(cls, file: SafetensorsFile, tensor: Tensor) -> Self:
        return cls(file, 0, TensorSpec.of(tensor), tensor)

    def read(self, into: Tensor | None = None) -> Tensor:
        return self.tensor

    def look(self) -> Tensor:
        return self.tensor

    def parts(self, step: int = 1, into: Tensor | None = None, *, again: bool = False) -> Iterator[Part]:
        yield Part(0, self.tensor)


@dataclass(frozen=True, slots=True)
class Mapped(StoredTensor):
    """A tensor whose bytes are replaced one by one: `table[byte]`, uint8 `[256]`; its dtype has one byte."""

    table: Tensor

    @classmethod
    def of(cls, stored: StoredTensor, table: Tensor) -> Self:
        """The tensor with its bytes replaced, after whatever replaced them before."""
        both = table[stored.table.long()] if isinstance(stored, Mapped) else table
        return cls(stored.file, stored.begin, stored.spec, both)

    @property
    def before(self) -> StoredTensor:
        """The tensor in the file."""
        return StoredTensor(self.file, self.begin, self.spec)

    def read(self, into: Tensor | None = None) -> Tensor:
        return self._changed(self.before.read(into))

    def look(self) -> Tensor:
        return self._changed(self.before.look())

    def parts(self, step: int = 1, into: Tensor | None = None, *, again: bool = False) -> Iterator[Part]:
        for first, rows in self.before.parts(step, into, again=again):
            yield Part(first, self._changed(rows))

    def _changed(self, rows: Tensor) -> Tensor:
        changed = torch.from_numpy(self.table.numpy()[rows.contiguous().view(torch.uint8).numpy()])
        return changed.view(self.spec.dtype).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class Edits:
    """What stands in the place of what a checkpoint has.

    Args:
        config: config.json; None to keep it.
        index: the index; None to keep it.
        tensors: name → what stands in its place, or is added.
        dropped: file and name of each tensor that goes away.
        removed: small files that go away.
    """

    config: Mapping[str, Any] | None = None
    index: Mapping[str, Any] | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    dropped: frozenset[tuple[str, str]] = frozenset()
    removed: frozenset[str] = frozenset()

    def then(self, *later: "Edits") -> "Edits":
        """All together, later ones on top."""
        every = (self, *later)
        return Edits(
            next((each.config for each in reversed(every) if each.config is not None), None),
            next((each.index for each in reversed(every) if each.index is not None), None),
            dict(item for each in every for item in each.tensors.items()),
            frozenset(place for each in every for place in each.dropped),
            frozenset(name for each in every for name in each.removed),
        )


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is wrong, and what a repair does about it.

    Args:
        subject: the tensor, file, key or entry.
        what: what it becomes, and why.
        edits: the same as data.
        moved: what that does to the weights of a module; None if nothing.
        mend: name of the mend; set by the table.
    """

    subject: str
    what: str
    edits: Edits = field(repr=False, compare=False)
    moved: Moved | None = field(default=None, repr=False, compare=False)
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that is wrong and is left, because nothing in the checkpoint says what would be right.

    Args:
        subject: the tensor, file, key or entry.
        why: what is wrong, what is not known, what to do.
        mend: name of the mend; set by the table.
    """

    subject: str
    why: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.why}"


type Found = Change | Refusal
