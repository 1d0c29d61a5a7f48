"""`repair`: a checkpoint directory → the same with what is wrong in it mended.

Everything is planned on headers and scales; only fused groups with several scales have their codes read. The output is
written by `write_directory`, as every export: a staging directory, one bundle for each tensor file, a verification of
the whole, one move. A file none of whose tensors change keeps its header, so it is the same file to the byte.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from amaxbridge.export.architectures.facts import GUESS
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.row_chunks import Written
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.disk.shard_layout import Layout, Shard
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.export.disk.staging import ALONE, StagedDirectory, check_output, plan_fingerprint
from amaxbridge.export.model_free.input_directory import check_apart
from amaxbridge.export.output.config_and_index import CONFIG_FILE, INDEX_FILE, Companions, json_bytes
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.output.finished_directory import BundleSize, BundleWriter, write_directory
from amaxbridge.export.output.provenance import MADE_FROM, RECORD_FILE, REPAIRS, read_record, versions
from amaxbridge.export.output.writing_processes import Apart
from amaxbridge.export.repair.all_mends import Diagnosis, diagnose
from amaxbridge.export.repair.edits import Given, Mapped
from amaxbridge.export.repair.mend import unseen_policy
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.export.repair.report import RepairReport
from amaxbridge.export.verify.all_rules import verify_view
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.fact_rules import architecture
from amaxbridge.export.verify.reference_weights import one_by_one
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.tensors import TensorSpec
from amaxbridge.output_options import RepairKeywords, RepairOptions, options_from


def repair(
    source: str | Path,
    output: str | Path,
    *,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    **options: Unpack[RepairKeywords],
) -> RepairReport:
    """Mends what is wrong in a compressed-tensors checkpoint, without training and without the original weights.

    Nothing is written if nothing is wrong, unless `copy` says so, or if it would not serve afterwards. What is changed
    is in the report, and in `amaxbridge.json` of the output; everything else is carried over byte for byte.

    Args:
        source: a directory of safetensors with config.json.
        output: the directory to write; nothing appears there until all of it is complete. The next run with the same
            arguments continues an interrupted one.
        expected: names and shapes of everything that the unquantized model has, where that is known.
        options: see `RepairOptions`.

    Raises:
        UsageError: the arguments cannot work.
        CheckpointError: the checkpoint would not serve even so, and what cannot be mended is named; or it changed while
            it was read.
        WriteError: the disk is full or fails; what is written is kept for the next run.
    """
    asked = options_from(RepairOptions, options)
    unseen = unseen_policy(asked.unseen)
    directory, target = given_path(source), resolved_output(output)
    if not directory.is_dir():
        raise UsageError(f"{directory} is not there: give a local directory")
    check_apart(directory, target)
    check_output(target, overwrite=asked.overwrite)
    companions = Companions.all_of(directory)
    files = SourceFiles.of(directory, [*companions.read, *companions.weights], hashed=asked.hash_source)
    with ExitStack() as stack:
        opened = stack.enter_context(CheckpointView(directory))
        if expected is not None:
            opened.expected = one_by_one(expected, opened.tensors, opened.once(architecture) or GUESS)
        before = verify_view(opened)
        found = diagnose(opened, unseen)
        after = verify_view(found.mended) if found.changes else before
        recorded = read_record(directory) or {} if found.changes else {}
        plan = RepairPlan(target, found, files, companions, expected, recorded, asked.record or {})
        report = RepairReport(directory, found.changes, found.refusals, before, after, plan.changed)
        if not (after.ok or asked.dry_run) and asked.verify:
            raise CheckpointError(_hopeless(report))
        if asked.dry_run or not (found.changes or asked.copy):
            files.check_unchanged()
            return report
        outcome = write_directory(plan, Apart(ALONE), plan.write, asked)
    return replace(report, written=True, resumed=outcome.resumed)


def _hopeless(report: RepairReport) -> str:
    """Why nothing is written: what cannot be mended."""
    left = [f"{finding.rule}: {problem}" for finding in report.after.failures for problem in finding.problems]
    refused = [f"{each.mend}: {each}" for each in report.refusals]
    why = f"\nNothing in the checkpoint says what would be right of:{listing(refused)}" if refused else ""
    can = f"{len(report.changes)} other things can be mended. " if report.changes else ""
    return (
        f"{report.source} cannot be made to serve by a repair:{listing(left)}{why}\n{can}dry_run=True shows all of it, "
        "verify=False writes what can be mended all the same; otherwise export or quantize again"
    )


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repaired directory will hold: see `PlannedDirectory`.

    Args:
        target: the directory to write.
        found: what is changed.
        files_read: what is read, as it was at the start.
        companions: everything that is no tensor file of the checkpoint.
        shapes: of the unquantized model.
        recorded: what the checkpoint records of itself.
        record: how it was asked for.
    """

    target: Path
    found: Diagnosis
    files_read: SourceFiles
    companions: Companions
    shapes: Mapping[str, tuple[int, ...]] | None
    recorded: Mapping[str, Any]
    record: Mapping[str, Any]
    packer: None = None
    keeps_state: bool = False

    @property
    def view(self) -> MendedView:
        return self.found.mended

    @property
    def files(self) -> Layout:
        return Layout(tuple(self._shard(name) for name in self.view.files))

    @property
    def keys(self) -> list[str]:
        """One bundle for each tensor file."""
        return [*self.view.files]

    @property
    def sizes(self) -> Mapping[str, BundleSize]:
        return {name: BundleSize.of(_specs(self._tensors(name))) for name in self.view.files}

    @property
    def finalizer(self) -> "RepairPlan":
        return self

    @property
    def nbytes_beside(self) -> int:
        return self.companions.nbytes

    @property
    def fingerprint(self) -> str:
        return plan_fingerprint(self.files_read.fingerprint, self._decisions, self.files)

    @property
    def made_from(self) -> str:
        return self.companions.fingerprint(self.fingerprint, self.view.config)

    def expected(self) -> Mapping[str, tuple[int, ...]] | None:
        return self.shapes

    @property
    def changed(self) -> tuple[str, ...]:
        """The files that are not the source's to the byte."""
        edits = self.found.mended.edits
        tensors = {stored.file.path.name for stored in edits.tensors.values()} | {file for file, _ in edits.dropped}
        small = [CONFIG_FILE] * (edits.config is not None) + [INDEX_FILE] * (edits.index is not None)
        return (*small, *sorted(edits.removed), *sorted(tensors))

    def write(self, done: frozenset[str], writer: BundleWriter) -> None:
        """Writes the tensor files that are not done."""
        for name in self.view.files:
            if name not in done:
                writer.write(Bundle(self._tensors(name), {}, name))

    def finalize_rows(self, bundle: Bundle) -> Iterator[Written]:
        """Every tensor of a file, as the edits have it."""
        for name, stored in bundle.tensors.items():
            for first, rows in stored.parts():
                yield Written(name, first, rows)

    def write_beside(self, staged: StagedDirectory, made_from: str | None) -> None:
        """config.json, the index and our record where they change; everything else as it is."""
        edits = self.view.edits
        written = {CONFIG_FILE: edits.config, INDEX_FILE: edits.index, RECORD_FILE: self._record(made_from)}
        for name, content in self.companions.contents():
            if written.get(name) is None and name not in edits.removed:
                staged.write_file(name, content)
        for name, changed in written.items():
            if changed is not None:
                staged.write_file(name, json_bytes(changed))

    def check_sources(self) -> None:
        self.files_read.check_unchanged()

    def _record(self, made_from: str | None) -> dict[str, Any] | None:
        """`amaxbridge.json`: what it said before, and what was repaired; None where nothing was."""
        if not self.found.changes:
            return None
        noted = [f"{each.mend}: {each}" for each in self.found.changes]
        repairs = [*(self.recorded.get(REPAIRS) or []), {"versions": versions(), "changes": noted, **self.record}]
        return {**self.recorded, MADE_FROM: made_from, REPAIRS: repairs}

    @property
    def _decisions(self) -> str:
        """Identifies what becomes of every tensor."""
        edits = self.view.edits
        return json.dumps(
            [
                edits.config,
                edits.index,
                sorted(edits.dropped),
                sorted(edits.removed),
                *map(_decided, edits.tensors.items()),
            ]
        )

    def _tensors(self, file: str) -> dict[str, StoredTensor]:
        return self.view.held[file]

    def _shard(self, file: str) -> Shard:
        """The file's own header, if it still says what is there; otherwise a new one, with its metadata."""
        opened, tensors = self.view.opened.files[file], self._tensors(file)
        specs = _specs(tensors)
        if specs == {name: stored.spec for name, stored in opened.tensors.items()}:
            offsets = {name: stored.begin for name, stored in opened.tensors.items()}
            return Shard(file, specs, _header(opened), offsets)
        return Shard.of(file, specs, {key: value for key, value in opened.metadata.items() if key != "format"})


def _specs(tensors: Mapping[str, StoredTensor]) -> dict[str, TensorSpec]:
    return {name: stored.spec for name, stored in tensors.items()}


def _header(opened: SafetensorsFile) -> bytes:
    """The header as it lies in the file, its length before it."""
    length = torch.empty(8, dtype=torch.uint8)
    opened.read(0, length)
    header = torch.empty(8 + int.from_bytes(bytes(length.tolist()), "little"), dtype=torch.uint8)
    opened.read(0, header)
    return header.numpy().tobytes()


def _decided(item: tuple[str, StoredTensor]) -> list[Any]:
    name, stored = item
    change = stored.tensor.tolist() if isinstance(stored, Given) else None
    table = stored.table.tolist() if isinstance(stored, Mapped) else None
    return [name, str(stored.spec), repr(change), table]
