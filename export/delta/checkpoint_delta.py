"""A delta of two checkpoint directories in one file: what changed, and how to make one of the other.

The file is safetensors. Its metadata name every file and tensor of the new directory, with the SHA-256 of its bytes,
and of the base's tensor where that is needed. Its tensors are what the base does not have:

    header FILE     the header of a tensor file, uint8
    file PATH       any other file, uint8
    gaps NAME       where elements of a tensor changed: see `TensorDelta`
    values NAME     the changed elements; or the whole tensor, where there are no gaps

Applied to the base it makes the new directory, byte for byte.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from amaxbridge.export.delta.tensor_delta import TensorDelta, delta_of, flat
from amaxbridge.export.disk.atomic_move import replace_file
from amaxbridge.export.disk.input_files import read_input
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.open_files import OpenFiles
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.disk.shard_layout import Shard
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.export.output.config_and_index import Companions
from amaxbridge.mappings.errors import CheckpointError, OutputExistsError, UsageError, listing
from amaxbridge.mappings.tensors import TensorSpec

DELTA_FILE = "delta.safetensors"
"""The name of a delta in a directory."""
METADATA = "amaxbridge_delta"
VERSION = 1


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """What a delta holds.

    Args:
        unchanged, in_places, whole: numbers of tensors of the new directory, by what the delta has of them.
        changed_elements: of the tensors that changed in places.
        nbytes: size of the delta file.
        whole_bytes: size of the new directory.
    """

    unchanged: int
    in_places: int
    whole: int
    changed_elements: int
    nbytes: int
    whole_bytes: int


class OpenedDirectory:
    """The files of a checkpoint directory: tensors by name, and the other files by path.

    Args:
        hashed: as in `SourceFiles`.

    Raises:
        UsageError: it is no directory, or has tensor files in directories of its own.
        CheckpointError: it has no tensors, a file cannot be read, or two files hold a tensor of one name.
    """

    def __init__(self, directory: Path, *, hashed: bool = False) -> None:
        if not directory.is_dir():
            raise UsageError(f"{directory} is not there: give a local directory")
        self.directory, self._open = directory, OpenFiles()
        self.companions = Companions.all_of(directory)
        names = sorted({*self.companions.weights, *self.companions.files})
        stored = [name for name in names if name.endswith(".safetensors")]
        if nested := [name for name in stored if "/" in name]:
            raise UsageError(
                f"{directory} has tensor files in directories of its own, which a delta cannot say:{listing(nested)}\n"
                "Move them out of the checkpoint"
            )
        self.files = {name: SafetensorsFile(directory / name, self._open, directory) for name in stored}
        self.others = {name: path for name, path in self.companions.files.items() if name not in self.files}
        self.source = SourceFiles.of(directory, [*self.files, *self.others], hashed=hashed)
        held = [(name, tensor) for file in self.files.values() for name, tensor in file.tensors.items()]
        self.tensors = dict(held)
        if not held:
            raise CheckpointError(f"{directory} has no safetensors files with tensors: give a checkpoint")
        if len(self.tensors) < len(held):
            twice = sorted({name for at, (name, _) in enumerate(held) if name in dict(held[:at])})
            raise CheckpointError(f"{directory}: {len(twice)} tensors are in two files:{listing(twice)}")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        paths = [*(self.directory / name for name in self.files), *self.others.values()]
        return sum(path.stat().st_size for path in paths)

    def header(self, name: str) -> Tensor:
        """The header of a tensor file as it lies there, its length before it: uint8."""
        file, length = self.files[name], torch.empty(8, dtype=torch.uint8)
        file.read(0, length)
        header = torch.empty(8 + int.from_bytes(bytes(length.tolist()), "little"), dtype=torch.uint8)
        file.read(0, header)
        return header

    def content(self, name: str) -> Tensor:
        """A file without tensors: uint8."""
        content = read_input(self.others[name], self.directory)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_delta(
    base: str | Path,
    new: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    hash_source: bool = False,
) -> DeltaReport:
    """Writes the delta that makes one checkpoint directory of another.

    Tensors that the base lacks, or has in another shape or dtype, are in it whole; those that only the base has are
    left out.

    Args:
        base, new: directories of safetensors.
        output: the file to write, `….safetensors`; or a directory, in which it is `delta.safetensors`.
        overwrite, hash_source: as in `OutputOptions`.

    Raises:
        UsageError: the arguments cannot work.
        CheckpointError: a directory is damaged, or changed while it was read.
        OutputExistsError: the file is there.
        WriteError: the disk is full or fails.
    """
    path = delta_path(output)
    if path.exists() and not overwrite:
        raise OutputExistsError(f"output {path} exists; choose another or give io.overwrite=true")
    with ExitStack() as stack:
        old, fresh = (
            stack.enter_context(OpenedDirectory(given_path(each), hashed=hash_source)) for each in (base, new)
        )
        found = {name: _Change.of(stored, old.tensors.get(name)) for name, stored in fresh.tensors.items()}
        others = {name: fresh.content(name) for name in fresh.others}
        kept = {name for name, held in others.items() if name in old.others and torch.equal(old.content(name), held)}
        beside = {f"header {name}": fresh.header(name) for name in fresh.files}
        beside |= {f"file {name}": content for name, content in others.items() if name not in kept}
        specs = {key: TensorSpec.of(content) for key, content in beside.items()}
        specs |= {f"{kind} {name}": spec for name, each in found.items() for kind, spec in each.specs.items()}
        said = {
            "version": VERSION,
            "tensor_files": list(fresh.files),
            "tensors": {name: each.said for name, each in found.items()},
            "files": {name: sha256([content]) for name, content in others.items()},
            "files_of_base": sorted(kept),
        }
        shard = Shard.of(path.name, specs, {METADATA: json.dumps(said, separators=(",", ":"))})

        def content() -> Iterator[bytes]:
            yield shard.header
            for key in shard.specs:
                kind, _, name = key.partition(" ")
                tensor = beside[key] if key in beside else found[name].made(kind)
                yield flat(tensor).view(torch.uint8).numpy().tobytes()
            for each in (old, fresh):
                each.source.check_unchanged()

        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content())
        return DeltaReport(
            unchanged=sum(each.count == 0 for each in found.values()),
            in_places=sum(bool(each.count) for each in found.values()),
            whole=sum(each.count is None for each in found.values()),
            changed_elements=sum(each.count or 0 for each in found.values()),
            nbytes=shard.nbytes,
            whole_bytes=fresh.nbytes,
        )


def delta_path(output: str | Path) -> Path:
    """The file of a delta: the path itself, or `delta.safetensors` in a directory."""
    path = given_path(output)
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / DELTA_FILE


def sha256(tensors: Iterable[Tensor]) -> str:
    """The hash of the bytes of tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(flat(tensor).view(torch.uint8).numpy())
    return digest.hexdigest()


def sha256_of(stored: StoredTensor) -> str:
    """The hash of a tensor in a file, read in parts."""
    return sha256(rows for _, rows in stored.parts())


@dataclass(frozen=True, slots=True)
class _Change:
    """What changed of one tensor, measured. It is made again to be written, so that no delta is held in memory.

    Args:
        base: the base's tensor; None if the tensor is sent whole.
        count: number of changed elements; None for a whole tensor.
        gaps: dtype of the gaps.
    """

    new: StoredTensor
    base: StoredTensor | None
    count: int | None
    gaps: torch.dtype = torch.uint8

    @classmethod
    def of(cls, new: StoredTensor, base: StoredTensor | None) -> Self:
        """Compares a tensor with that of the base, if that has one of this shape and dtype."""
        if base is None or base.spec != new.spec:
            return cls(new, None, None)
        gaps = delta_of(base.read(), new.read()).gaps
        return cls(new, None, None) if gaps is None else cls(new, base, gaps.numel(), gaps.dtype)

    @property
    def said(self) -> dict[str, Any]:
        """What the metadata say of it."""
        sha256_of_base = {} if self.base is None else {"base": sha256_of(self.base)}
        return {"sha256": sha256_of(self.new), **sha256_of_base}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Its tensors in the delta, by kind."""
        if self.count is None:
            return {"values": self.new.spec}
        values = {
            "gaps": TensorSpec((self.count,), self.gaps),
            "values": TensorSpec((self.count,), self.new.spec.dtype),
        }
        return values if self.count else {}

    def made(self, kind: str) -> Tensor:
        """Its gaps or values."""
        new = self.new.read()
        delta = TensorDelta(self.new.spec, None, new) if self.base is None else delta_of(self.base.read(), new)
        made = delta.gaps if kind == "gaps" else delta.values
        assert made is not None, "measured"
        return made
