"""`apply`: a base directory and a delta → the directory that the delta was made for, byte for byte.

Everything is checked before a byte is written: the delta against itself, and every tensor and file of the base that it
builds on against the hash that it names. The output is written by `write_directory`, as every export: a staging
directory and one move. What is written is compared with the hashes on its way.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from amaxbridge.export.delta.checkpoint_delta import (
    METADATA,
    VERSION,
    OpenedDirectory,
    delta_path,
    sha256,
    sha256_of,
)
from amaxbridge.export.delta.tensor_delta import TensorDelta, apply
from amaxbridge.export.disk.input_paths import checked_name, given_path, weight_file_name
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.row_chunks import WholeTensor, Written
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, read_header
from amaxbridge.export.disk.shard_layout import Layout, Shard
from amaxbridge.export.disk.staging import ALONE, StagedDirectory, check_output, plan_fingerprint
from amaxbridge.export.disk.strict_json import parse_json_object
from amaxbridge.export.model_free.input_directory import check_apart
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.output.finished_directory import BundleSize, BundleWriter, write_directory
from amaxbridge.export.output.writing_processes import Apart
from amaxbridge.export.progress import Progress
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.output_options import RepairOptions


@dataclass(frozen=True, slots=True)
class AppliedReport:
    """What was written: numbers of tensors and of files without tensors, and bytes of the tensor files."""

    tensors: int
    files: int
    nbytes: int


def apply_delta(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    hash_source: bool = False,
    progress: Progress | None = None,
) -> AppliedReport:
    """Writes the directory that a delta was made for: whole, or not at all.

    Args:
        base: the directory that the delta was made from, or one with the same tensors in other files.
        delta: what `write_delta` wrote: the file, or the directory that holds it.
        output: the directory to write. The next run with the same arguments continues an interrupted one.
        overwrite, hash_source, progress: as in `OutputOptions`.

    Raises:
        UsageError: the arguments cannot work.
        CheckpointError: the delta is damaged, or the base is another; all tensors that differ are named.
        OutputExistsError: the output is not empty.
        WriteError: the disk is full or fails; what is written is kept for the next run.
    """
    directory, target = given_path(base), resolved_output(output)
    check_apart(directory, target)
    check_output(target, overwrite=overwrite)
    with ExitStack() as stack:
        held = stack.enter_context(OpenedDirectory(directory, hashed=hash_source))
        opened = Delta(stack.enter_context(SafetensorsFile(delta_path(delta))))
        opened.check_base(held)
        plan = AppliedDirectory(target, opened, held)
        # The hashes say that the output is what the delta was made for: there is nothing to verify beyond.
        options = RepairOptions(overwrite=overwrite, verify=False, progress=progress)
        write_directory(plan, Apart(ALONE), plan.write, options)
        return AppliedReport(len(opened.specs), len(opened.files), sum(shard.nbytes for shard in opened.shards))


class Delta:
    """A delta file, read and checked against itself.

    Raises:
        CheckpointError: it is no delta, of another version, or damaged.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        self.file = file
        try:
            said = parse_json_object(file.metadata[METADATA].encode())
        except KeyError:
            raise CheckpointError(f"{file.path} is no delta: give a file that `amaxbridge delta` wrote") from None
        except ValueError as error:
            raise CheckpointError(f"{file.path} is damaged: {error}; copy it again") from error
        if said.get("version") != VERSION:
            raise CheckpointError(
                f"{file.path} is a delta of version {said.get('version')!r}, this program reads {VERSION}: update it"
            )
        self.tensor_files = [weight_file_name(name, file.path) for name in _list(said, "tensor_files", file)]
        self.files = {checked_name(name, file.path): each for name, each in _dict(said, "files", file).items()}
        self.of_base = frozenset(_list(said, "files_of_base", file))
        self.hashes = {name: _hashes(name, each, file) for name, each in _dict(said, "tensors", file).items()}
        self.shards = [self._shard(name) for name in self.tensor_files]
        self.specs = {name: spec for shard in self.shards for name, spec in shard.specs.items()}
        self._check()

    def content(self, kind: str, name: str) -> Tensor:
        """A tensor of the delta.

        Raises:
            CheckpointError: there is none.
        """
        stored = self.file.tensors.get(f"{kind} {name}")
        if stored is None:
            raise CheckpointError(f"{self.file.path} is damaged: it lacks `{kind} {name}`; copy it again")
        return stored.read()

    def check_base(self, base: OpenedDirectory) -> None:
        """Compares what the delta builds on with what is there.

        Raises:
            CheckpointError: tensors or files are missing, or others; all are named.
        """
        problems = []
        for name, (_, of_base) in self.hashes.items():
            held = base.tensors.get(name)
            if of_base and (held is None or held.spec != self.specs[name]):
                problems.append(f"{name}: {'not there' if held is None else held.spec}, {self.specs[name]} expected")
            elif of_base and held is not None and sha256_of(held) != of_base:
                problems.append(f"{name}: other bytes")
        for name in sorted(self.of_base):
            if name not in base.others:
                problems.append(f"{name}: not there")
            elif sha256([base.content(name)]) != self.files[name]:
                problems.append(f"{name}: other bytes")
        if problems:
            raise CheckpointError(
                f"{base.directory} is not what {self.file.path} was made from: {len(problems)} tensors and files "
                f"differ:{listing(problems)}\nGive base= the directory that the delta was made from"
            )

    def tensor(self, name: str, base: OpenedDirectory) -> Tensor:
        """A tensor of the new directory.

        Raises:
            CheckpointError: it is not the one that the delta was made for.
        """
        digest, of_base = self.hashes[name]
        spec = self.specs[name]
        if not of_base:
            made = apply(TensorDelta(spec, None, self.content("values", name)), None)
        elif f"gaps {name}" in self.file.tensors:
            delta = TensorDelta(spec, self.content("gaps", name), self.content("values", name))
            made = apply(delta, base.tensors[name].read())
        else:
            made = base.tensors[name].read()
        if sha256([made]) != digest:
            raise CheckpointError(f"{self.file.path} is damaged: {name} does not become what it was made for")
        return made

    def other(self, name: str, base: OpenedDirectory) -> bytes:
        """A file of the new directory that holds no tensors.

        Raises:
            CheckpointError: it is not the one that the delta was made for.
        """
        content = base.content(name) if name in self.of_base else self.content("file", name)
        if sha256([content]) != self.files[name]:
            raise CheckpointError(f"{self.file.path} is damaged: {name} is not what it was made for")
        return content.numpy().tobytes()

    def _shard(self, name: str) -> Shard:
        text = self.content("header", name).numpy().tobytes()
        try:
            header = read_header(text[8:])
            if int.from_bytes(text[:8], "little") != len(text) - 8:
                raise ValueError("another length")
        except ValueError as error:
            raise CheckpointError(f"{self.file.path} is damaged: the header of {name}: {error}") from error
        return Shard(name, header.specs, text, header.begins)

    def _check(self) -> None:
        """Every tensor of the new directory is in one file and has its hashes, and nothing is left over."""
        count = sum(len(shard.specs) for shard in self.shards)
        parts = {"header": self.tensor_files, "file": self.files, "gaps": self.specs, "values": self.specs}
        known = {f"{kind} {name}" for kind, names in parts.items() for name in names}
        fits = (
            count == len(self.specs)
            and self.specs.keys() == self.hashes.keys()
            and known >= self.file.tensors.keys()
            and self.of_base <= self.files.keys()
            and len({*self.tensor_files, *self.files}) == len(self.tensor_files) + len(self.files)
        )
        if not fits:
            raise CheckpointError(f"{self.file.path} is damaged: its parts do not fit each other; copy it again")


@dataclass(frozen=True, slots=True)
class AppliedDirectory:
    """What the directory will hold: see `PlannedDirectory`."""

    target: Path
    delta: Delta
    base: OpenedDirectory
    packer: None = None
    keeps_state: bool = False

    @property
    def files(self) -> Layout:
        return Layout(tuple(self.delta.shards))

    @property
    def keys(self) -> list[str]:
        """One bundle for each tensor."""
        return [*self.delta.specs]

    @property
    def sizes(self) -> Mapping[str, BundleSize]:
        return {name: BundleSize(1, spec.nbytes) for name, spec in self.delta.specs.items()}

    @property
    def fingerprint(self) -> str:
        return plan_fingerprint(self.base.source.fingerprint, self.delta.file.metadata[METADATA], self.files)

    @property
    def made_from(self) -> str:
        return self.fingerprint

    @property
    def finalizer(self) -> "AppliedDirectory":
        return self

    @property
    def nbytes_beside(self) -> int:
        return self.base.companions.nbytes

    def expected(self) -> None:
        """Nothing is known of the unquantized model."""

    def write(self, done: frozenset[str], writer: BundleWriter) -> None:
        """Writes every tensor."""
        for name in self.delta.specs:
            if name not in done:
                writer.write(Bundle({name: WholeTensor(self.delta.tensor(name, self.base))}, {}, name))

    def finalize_rows(self, bundle: Bundle) -> Iterator[Written]:
        """The tensor as it is."""
        for name, tensor in bundle.tensors.items():
            for first, rows in tensor.parts():
                yield Written(name, first, rows)

    def write_beside(self, staged: StagedDirectory, made_from: str | None) -> None:
        """The files without tensors."""
        del made_from
        for name in self.delta.files:
            staged.write_file(name, self.delta.other(name, self.base))

    def check_sources(self) -> None:
        self.base.source.check_unchanged()
        self.delta.file.check_unchanged()


def _list(said: Mapping[str, Any], key: str, file: SafetensorsFile) -> list[str]:
    found = said.get(key)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(f"{file.path} is damaged: {key} is no list of names; copy it again")
    return found


def _dict(said: Mapping[str, Any], key: str, file: SafetensorsFile) -> dict[str, Any]:
    found = said.get(key)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.path} is damaged: it does not say {key}; copy it again")
    return found


def _hashes(name: str, said: Any, file: SafetensorsFile) -> tuple[str, str]:
    """The hash of a tensor, and that of the base's; "" if it is whole."""
    if not isinstance(said, dict) or not said.keys() <= {"sha256", "base"} or "sha256" not in said:
        raise CheckpointError(f"{file.path} is damaged: it does not say the hashes of {name}; copy it again")
    return str(said["sha256"]), str(said.get("base", ""))
