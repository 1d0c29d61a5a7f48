"""From bundles to a finished directory: the one write path of every export.

A live model, a Megatron checkpoint and a Hugging Face directory are different sources of bundles. What follows is the
same for all: a staging directory with every shard at full size, the bundles in any order, tensors that belong to no
bundle, the small files, a verification of the whole, and one move to the target.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from amaxbridge.export.disk.packed_experts import ExpertPacker
from amaxbridge.export.disk.row_chunks import Written
from amaxbridge.export.disk.shard_layout import Layout, Shard
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.disk.staging import StagedDirectory, check_room, plan_fingerprint
from amaxbridge.export.output.config_and_index import Companions
from amaxbridge.export.output.finalizer import Bundle, Finalizer
from amaxbridge.export.output.model_card import Conversion, files_beside
from amaxbridge.export.output.provenance import MADE_FROM
from amaxbridge.export.output.writing_processes import Writers
from amaxbridge.export.progress import NoProgress, Progress
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import UsageError, WriteError
from amaxbridge.mappings.tensors import TensorSpec
from amaxbridge.output_options import OutputOptions, RepairOptions


class Source(Protocol):
    """What a directory is made from: `SourceFiles`, or a model whose config.json was read."""

    def check_unchanged(self) -> None:
        """Raises CheckpointError if it is another one by now."""


@dataclass(frozen=True, slots=True)
class BundleSize:
    """The size of a bundle's source tensors.

    Args:
        tensors: number of tensors.
        nbytes: bytes of all of them.
    """

    tensors: int
    nbytes: int

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec]) -> Self:
        return cls(len(specs), sum(spec.nbytes for spec in specs.values()))


class Makes(Protocol):
    """What becomes of the tensors of a bundle: a `Finalizer`, or whatever writes them otherwise."""

    def finalize_rows(self, bundle: Bundle) -> Iterable[Written]:
        """Yields what is written for a bundle."""


class PlannedDirectory(Protocol):
    """What a directory will hold, as `write_directory` must know it: see the fields of `DirectoryPlan`."""

    @property
    def target(self) -> Path: ...
    @property
    def keys(self) -> list[str]: ...
    @property
    def sizes(self) -> Mapping[str, BundleSize]: ...
    @property
    def expected(self) -> Callable[[], Mapping[str, tuple[int, ...]] | None]: ...
    @property
    def packer(self) -> ExpertPacker | None: ...
    @property
    def keeps_state(self) -> bool: ...

    @property
    def files(self) -> Layout:
        """All safetensors files."""

    @property
    def finalizer(self) -> Makes:
        """What becomes of the tensors of a bundle."""

    @property
    def nbytes_beside(self) -> int:
        """Bytes of the files beside the tensors."""

    @property
    def fingerprint(self) -> str | None:
        """A hash of everything that decides the bytes of `files`; None if no other run could tell."""

    @property
    def made_from(self) -> str | None:
        """A hash of everything that the output is made from; None if no other run could tell."""

    def write_beside(self, staged: StagedDirectory, made_from: str | None) -> None:
        """Writes what any process could write, in the one that completes the work."""

    def check_sources(self) -> None:
        """Raises CheckpointError if what is read has changed since the start."""


class BundleWriter:
    """Context manager that writes bundles at their planned places. Each process has one, which its threads share.

    Args:
        staged: the open staging directory, with every shard of `files`.
        sizes: key → size of each bundle that this process writes.
        done: keys of the bundles that an interrupted run has written, also on behalf of other processes.
        packer: packs unquantized experts; None if the files hold them one by one.
        keeps_state: True to write the quantizer state of each bundle, too.
    """

    def __init__(
        self,
        staged: StagedDirectory,
        files: Layout,
        finalizer: Makes,
        sizes: Mapping[str, BundleSize],
        *,
        done: frozenset[str] = frozenset(),
        packer: ExpertPacker | None = None,
        keeps_state: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._finalizer, self._sizes = finalizer, sizes
        self._packer, self._keeps_state = packer, keeps_state
        self._progress = progress or NoProgress()
        self._progress.begin(
            tensors=sum(size.tensors for key, size in sizes.items() if key not in done),
            nbytes=sum(size.nbytes for size in sizes.values()),
            kept=sum(size.nbytes for key, size in sizes.items() if key in done),
        )
        self._writer = ShardWriter(staged.path, files, staged)

    def write(self, bundle: Bundle, fetched: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        """Quantizes one bundle, writes it, and records it as done.

        Args:
            bundle: the bundle.
            fetched: moves rows from the device where they are quantized to the CPU.
        """
        made = self._finalizer.finalize_rows(bundle)
        if self._packer is not None:
            made = self._packer.pack({name: tensor for name, _, tensor in made})
        for name, first, rows in made:
            self._writer.write(name, fetched(rows), first)
        if self._keeps_state:
            _write_all(self._writer, bundle.state.items())
        self._writer.done(bundle.key)
        size = self._sizes[bundle.key]
        self._progress.advance(tensors=size.tensors, nbytes=size.nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryPlan:
    """What a directory will hold, before a byte of it is written.

    Args:
        target: the directory to write, as `resolved_output` returns it.
        companions: tokenizer, templates and so on, carried over from the Hugging Face directory of the source.
        sources: what is read, as it was when it was read; compared before the directory is moved into place.
        config: config.json of the source.
        made_of: identifies what the bundles are made from, so that an interrupted run can continue. None for a live
            model, whose weights may differ the next time.
        conversion: what is made from which tensors; its layout covers the weights.
        keys: keys of all bundles.
        sizes: key → size of each bundle that this process writes.
        expected: name → shape of every tensor of the unquantized model, for the verification.
        packer: as in `BundleWriter`.
        state_shards: the files of quantizer state: the state of each bundle, and that of `conversion`.
        carried: returns the tensors that belong to no bundle and are written unchanged.
    """

    target: Path
    companions: Companions
    sources: tuple[Source, ...]
    config: Mapping[str, Any]
    made_of: str | None
    conversion: Conversion
    keys: list[str]
    sizes: Mapping[str, BundleSize]
    expected: Callable[[], Mapping[str, tuple[int, ...]]]
    packer: ExpertPacker | None = None
    state_shards: tuple[Shard, ...] = ()
    carried: Callable[[], Iterable[tuple[str, Tensor]]] = tuple

    @property
    def keeps_state(self) -> bool:
        """True if quantizer state is written beside the weights."""
        return bool(self.state_shards)

    @property
    def files(self) -> Layout:
        """All safetensors files."""
        return Layout((*self.conversion.layout.shards, *self.state_shards))

    @property
    def fingerprint(self) -> str | None:
        """A hash of everything that decides the bytes of `files`."""
        return self.made_of and plan_fingerprint(self.made_of, self.conversion.finalizer.fingerprint, self.files)

    @property
    def made_from(self) -> str | None:
        """As `PlannedDirectory.made_from`."""
        fingerprint = self.fingerprint
        return fingerprint and self.companions.fingerprint(fingerprint, self.config)

    @property
    def finalizer(self) -> Finalizer:
        """As `PlannedDirectory.finalizer`."""
        return self.conversion.finalizer

    @property
    def nbytes_beside(self) -> int:
        """As `PlannedDirectory.nbytes_beside`."""
        return self.companions.nbytes

    def check_sources(self) -> None:
        """As `PlannedDirectory.check_sources`."""
        for source in self.sources:
            source.check_unchanged()

    def write_beside(self, staged: StagedDirectory, made_from: str | None) -> None:
        """As `PlannedDirectory.write_beside`."""
        conversion = replace(self.conversion, record={**self.conversion.record, MADE_FROM: made_from})
        writer = ShardWriter(staged.path, self.files, staged)
        try:
            _write_all(writer, self.carried())
            if self.keeps_state:
                _write_all(writer, conversion.state.amax.items())
        finally:
            writer.close()
        for name, content in files_beside(self.companions, self.config, conversion, alone=not self.keeps_state):
            staged.write_file(name, content)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of `write_directory` for one process.

    Args:
        ended: True if this process moved the directory into place; otherwise another did or will.
        resumed: number of bundles that were done before.
    """

    ended: bool
    resumed: int


def write_directory(
    plan: PlannedDirectory,
    writers: Writers,
    make: Callable[[frozenset[str], BundleWriter], None],
    options: OutputOptions | RepairOptions,
) -> Outcome:
    """Writes a directory, or this process's share of it. Collective if the writers are ranks of a live model.

    Args:
        directory: what to write.
        writers: the processes that write it.
        make: writes the bundles of this process except those whose keys it is given, which are done.
        options: `overwrite`, `verify` and `progress` are used.

    Raises:
        OutputExistsError: the target is not empty, or another run is writing it.
        CheckpointError: the output would not serve, or the source changed while it was read.
        WriteError: the disk is full or fails; what is written is kept for the next run.
    """
    check_room(plan.target, plan.nbytes_beside)
    made_from = plan.made_from

    def finish() -> None:
        if staged.is_complete:  # an earlier run did this, and could not move it
            return
        plan.write_beside(staged, made_from)
        if options.verify:
            verify(staged.path, expected=plan.expected()).conclude(plan.target)
        plan.check_sources()

    overwrite = options.overwrite
    with StagedDirectory(plan.target, plan.fingerprint, writers.share, output=made_from, overwrite=overwrite) as staged:
        done = writers.open(staged, plan.files)
        if done is None:
            return Outcome(ended=False, resumed=0)
        try:
            with BundleWriter(
                staged,
                plan.files,
                plan.finalizer,
                plan.sizes,
                done=done,
                packer=plan.packer,
                keeps_state=plan.keeps_state,
                progress=options.progress,
            ) as writer:
                make(done, writer)
            return Outcome(writers.end(staged, plan.keys, finish), len(done.intersection(plan.keys)))
        except (WriteError, UsageError):
            raise
        except Exception:  # anything else may come of a source that changes
            plan.check_sources()
            raise


def _write_all(writer: ShardWriter, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        writer.write(name, tensor)
