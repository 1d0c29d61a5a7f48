"""Saving: what every export does once it has a plan, whether its bundles come from a live model or from files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.carried_tensors import carried_specs, carried_tensors, ignored
from amaxbridge.bridge.plan.casting import Casting
from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.bridge.plan.tensor_decisions import decide, specs_of
from amaxbridge.bridge.plan.writing_processes import Writers
from amaxbridge.export.amax.fused_group_amax import missing_policy
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.amax.quant_state_file import ModelIdentity, plan_quant_state
from amaxbridge.export.disk.packed_experts import ExpertPacker
from amaxbridge.export.disk.shard_layout import DEFAULT_SHARD_BYTES, Layout, Shard, plan_layout
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.disk.staging import StagedDirectory, plan_fingerprint
from amaxbridge.export.model_free.input_directory import check_apart, check_ignored
from amaxbridge.export.output.config_and_index import output_fingerprint
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.output.model_card import Conversion, files_beside
from amaxbridge.export.output.provenance import MADE_FROM
from amaxbridge.export.progress import NoProgress, Progress
from amaxbridge.export.schemes import Recipe, find_scheme
from amaxbridge.export.verify import verify
from amaxbridge.mappings.amax import PRE_QUANT_SCALE, STORED_SCALES
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.names import is_quantizer_state, is_routed_expert, module_of
from amaxbridge.mappings.tensors import TensorSpec

type Stream = Callable[[Sequence[BundlePlan]], Iterator[Bundle]]


class SaveOptions(TypedDict, total=False):
    """How a checkpoint is saved; `Saver` has the defaults.

    Args:
        scheme: as `find_scheme` takes it: `nvfp4` and so on, `auto`, `none` for plain weights, or a recipe.
        ignore: modules to leave as they are: full names, or `re:` and a pattern; each must match something.
        missing_amax: what to do about an amax that makes no scale: `error`, `from_weights` or `group_max`.
        overwrite: replace what is at the output.
        max_shard_bytes: of one safetensors file, but for a single tensor that is larger.
        dry_run: plan and check everything, write nothing.
        progress: is told how far it is.
        record: how the export was asked for, kept in `amaxbridge.json`, and `command_line` of it in the model card.
        dtype: of the weights: `bfloat16`, `float16` or `float32`; None for what config.json says where they are fp32,
            and else for that of the weights.
        quant_state: write `quant_state.safetensors`, too; beside plain weights, what a later run quantizes them with.
    """

    scheme: str | Recipe | None
    ignore: Sequence[str]
    missing_amax: str
    overwrite: bool
    max_shard_bytes: int
    dry_run: bool
    verify: bool
    progress: Progress
    record: Mapping[str, Any] | None
    quant_state: bool
    dtype: str | None


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did, or with `dry_run` would do: the same in every process, but for `ended`.

    Args:
        scheme: as users gave it.
        written: every tensor, experts one by one even where the files pack them.
        quantized: module → the name of its scheme.
        ignored: the linear modules that are left as they are.
        filled: amax that were missing or unusable: quantizer → what filled it.
        ended: whether this process put the output into place, or for a dry run is the first.
    """

    scheme: str
    bundles: Sequence[BundlePlan]
    written: Mapping[str, TensorSpec]
    layout: Layout
    quantized: Mapping[str, str]
    ignored: Sequence[str]
    state: QuantState
    filled: Mapping[str, str]
    ended: bool

    @property
    def sources(self) -> dict[str, TensorSpec]:
        """Every Hugging Face tensor that goes in, quantizer state included."""
        return specs_of(self.bundles)


class Saver:
    """Saves one checkpoint, with the other writers. Options as in `SaveOptions`.

    Raises:
        UsageError: an unknown scheme or policy, or an output that is not empty.
    """

    def __init__(
        self,
        hf: HFModel,
        writers: Writers,
        target: Path,
        *,
        scheme: str | Recipe | None = "nvfp4",
        ignore: Sequence[str] = (),
        missing_amax: str = "error",
        overwrite: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        dry_run: bool = False,
        verify: bool = True,
        progress: Progress | None = None,
        record: Mapping[str, Any] | None = None,
        quant_state: bool = False,
        dtype: str | None = None,
    ) -> None:
        self._hf, self._writers = hf, writers
        self._target, self._overwrite = target.expanduser().absolute(), overwrite
        if hf.directory is not None:
            check_apart(hf.directory, self._target)
        writers.check_output(self._target, overwrite=overwrite)
        self.recipe, self._ignore = find_scheme(scheme, ignore), ignore
        self._missing = missing_policy(missing_amax)
        self._max_shard_bytes, self._dry_run, self._verify = max_shard_bytes, dry_run, verify
        self._progress = progress or NoProgress()
        self._record = {**(record or {}), **({"notes": hf.notes} if hf.notes else {})}
        self._keeps_state, self._dtype = quant_state, dtype

    def save(
        self,
        plan: Sequence[BundlePlan],
        stream: Stream,
        collect: Callable[[], QuantState],
        *,
        source: str | None = None,
    ) -> ExportReport:
        """Writes the bundles of a plan: collective where the writers are ranks of a live model.

        Args:
            stream: gives those of some planned bundles that this process owns.
            collect: gives the per-tensor state; called when it is needed.
            source: names what the bundles are made from; with it, an interrupted export can go on. None for a live
                model, whose weights may be others the next time.
        """
        state = collect() if self.recipe or self._keeps_state else QuantState()
        casting = Casting.of(self._hf, specs_of(plan), self._dtype)
        self._hf = casting.described(self._hf)
        finalizer = decide(self._hf, plan, casting, self.recipe, state, self._missing, warn=self._writers.first)
        carried = carried_specs(self._hf, required=not self._dry_run)
        finalizer.ignore += ignored(self._hf)
        if self.recipe is not None:
            check_ignored(self._ignore, {*map(module_of, finalizer.outputs), *finalizer.ignore})
        any_quantized = any(map(is_routed_expert, finalizer.quantized))
        packer = ExpertPacker(finalizer.output_specs, None if any_quantized else self._hf.family.packed_experts)
        layout = plan_layout({**packer.specs, **carried}, self._max_shard_bytes)
        kept = self._state_file(state, specs_of(plan)) if self._keeps_state else ()
        ended = self._writers.first
        if not self._dry_run:
            specs = specs_of(plan)
            before = sum(spec.nbytes for name, spec in specs.items() if not is_quantizer_state(name))
            before += sum(spec.nbytes for spec in carried.values())
            files = Layout((*layout.shards, *kept))
            fingerprint = source and plan_fingerprint(source, finalizer.fingerprint, files)
            made_from = fingerprint and output_fingerprint(fingerprint, self._hf.written, self._hf.directory)
            record = {**self._record, MADE_FROM: made_from}
            output = _Output(Conversion(finalizer, layout, before, state, record), packer, files, carried)
            ended = self._write(plan, lambda needed: map(casting.bundle, stream(needed)), output, fingerprint)
        return ExportReport(
            self.recipe.name if self.recipe else "none",
            plan,
            finalizer.output_specs,
            layout,
            finalizer.scheme_names,
            finalizer.ignore,
            state,
            finalizer.filled,
            ended,
        )

    def _state_file(self, state: QuantState, specs: Mapping[str, TensorSpec]) -> tuple[Shard]:
        if any(name.endswith(STORED_SCALES) for name in specs):
            raise UsageError("quant_state=true: FP8 parameters that are written as they are leave no amax to keep")
        folded = [name for name in {*specs, *state.amax} if name.endswith(PRE_QUANT_SCALE)]
        if folded:
            raise UsageError(
                f"quant_state=true: the state would not fit weights that {len(folded)} input scales are folded into:"
                f"{listing(sorted(folded))}\nExport without it, or disable AWQ and SmoothQuant and calibrate again"
            )
        return (plan_quant_state(state, specs, ModelIdentity.of(self._hf.written, specs)),)

    def _write(self, plan: Sequence[BundlePlan], stream: Stream, output: "_Output", fingerprint: str | None) -> bool:
        """Whether it was this process that ended it."""
        made_from = output.conversion.record[MADE_FROM]
        with StagedDirectory(
            self._target, fingerprint, self._writers.share, output=made_from, overwrite=self._overwrite
        ) as staged:
            done = self._writers.open(staged, output.files)
            if done is None:
                return False
            self._write_mine(plan, done, stream, output, staged)
            keys = [bundle.key for bundle in plan]
            return self._writers.end(staged, keys, lambda: self._finish(plan, output, staged))

    def _write_mine(
        self,
        plan: Sequence[BundlePlan],
        done: frozenset[str],
        stream: Stream,
        output: "_Output",
        staged: StagedDirectory,
    ) -> None:
        """The bundles of this process that are not done."""
        mine = self._begin(plan, done)
        writer = ShardWriter(staged.path, output.files, staged.journal)
        try:
            for bundle in stream([bundle for bundle in plan if bundle.key not in done]):
                for name, first, tensor in output.packer.pack(dict(output.conversion.finalizer.finalize(bundle))):
                    writer.write(name, tensor, first)
                if self._keeps_state:
                    _write_all(writer, bundle.state.items())
                writer.done(bundle.key)
                planned = mine[bundle.key]
                self._progress.advance(tensors=len(planned.specs), nbytes=planned.nbytes)
        finally:
            writer.close()

    def _finish(self, plan: Sequence[BundlePlan], output: "_Output", staged: StagedDirectory) -> None:
        """What every process could write, by the one that ends the work; then all is checked as it will be served."""
        writer = ShardWriter(staged.path, output.files)
        try:
            _write_all(writer, carried_tensors(self._hf))
            if self._keeps_state:
                _write_all(writer, output.conversion.state.amax.items())
        finally:
            writer.close()
        for name, content in files_beside(
            self._hf.directory, self._hf.written, output.conversion, alone=not self._keeps_state
        ):
            staged.write_file(name, content)
        if self._verify:
            verify(staged.path, expected=self._expected(plan, output.carried)).conclude(self._target)

    def _expected(self, plan: Sequence[BundlePlan], carried: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
        """The shapes that transformers expects, or where it has no such model, those planned; and what is carried."""
        planned = {name: spec for name, spec in specs_of(plan).items() if not is_quantizer_state(name)}
        known = {name: TensorSpec.of(each) for name, each in (self._hf.file_tensors or {}).items()}
        expected = {**(known or planned), **carried}
        return {name: spec.shape for name, spec in expected.items()}

    def _begin(self, plan: Sequence[BundlePlan], done: frozenset[str]) -> dict[str, BundlePlan]:
        """The bundles that this process owns, announced."""
        mine = {bundle.key: bundle for bundle in plan if bundle.owner == self._writers.me}
        self._progress.begin(
            tensors=sum(len(bundle.specs) for key, bundle in mine.items() if key not in done),
            nbytes=sum(bundle.nbytes for bundle in mine.values()),
            kept=sum(bundle.nbytes for key, bundle in mine.items() if key in done),
        )
        return mine


@dataclass(frozen=True, slots=True)
class _Output:
    """What is to be written.

    Args:
        conversion: what is made, and of what; its layout is that of the weights.
        packer: packs experts that stay as they are.
        files: the layout of the weights, with the quantizer state where it is kept.
        carried: the tensors that go in unchanged, beside those of Megatron.
    """

    conversion: Conversion
    packer: ExpertPacker
    files: Layout
    carried: Mapping[str, TensorSpec]


def _write_all(writer: ShardWriter, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        writer.write(name, tensor)
