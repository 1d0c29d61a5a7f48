"""Saving: everything that an export does once it has a plan, for bundles of a live model or of files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.adapters import Merge, adapter_mode, is_remeasured
from amaxbridge.bridge.plan.carried_tensors import carried_specs, carried_tensors, ignored
from amaxbridge.bridge.plan.casting import Casting
from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.bridge.plan.tensor_decisions import decide, specs_of
from amaxbridge.bridge.stored.main_parameters import takes_main_parameters
from amaxbridge.export.amax.fused_group_amax import missing_policy, mixed_policy
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.amax.quant_state_file import ModelIdentity, plan_quant_state
from amaxbridge.export.disk.io_errors import changed_meanwhile
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.packed_experts import ExpertPacker
from amaxbridge.export.disk.shard_layout import Layout, Shard, plan_layout
from amaxbridge.export.disk.source_files import SeveralSources, SourceFiles
from amaxbridge.export.hub import check_name
from amaxbridge.export.model_free.input_directory import check_apart, check_ignored
from amaxbridge.export.output.config_and_index import Companions
from amaxbridge.export.output.finalizer import Bundle, Finalizer
from amaxbridge.export.output.finished_directory import BundleSize, BundleWriter, DirectoryPlan, write_directory
from amaxbridge.export.output.model_card import Conversion
from amaxbridge.export.output.nonfinite import FiniteCheck, nonfinite_policy
from amaxbridge.export.output.writing_processes import Writers
from amaxbridge.export.schemes import find_scheme
from amaxbridge.mappings.amax import PRE_QUANT_SCALE, STORED_SCALES
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.names import is_quantizer_state, is_routed_expert, module_of
from amaxbridge.mappings.tensors import TensorSpec
from amaxbridge.output_options import SaveOptions

type Stream = Callable[[Sequence[BundlePlan]], Iterator[Bundle]]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of an export (planned, with `dry_run`), the same in every process except for `ended`.

    Args:
        scheme: name of the scheme or recipe.
        written: every tensor, with experts one by one even if the files pack them.
        quantized: module → name of its scheme.
        ignored: the unquantized linear modules.
        filled: missing or unusable amax: quantizer → what filled it.
        ended: True if this process moved the output into place; in a dry run, if it is the first.
    """

    scheme: str
    bundles: Sequence[BundlePlan] = field(repr=False)
    written: Mapping[str, TensorSpec] = field(repr=False)
    layout: Layout = field(repr=False)
    quantized: Mapping[str, str] = field(repr=False)
    ignored: Sequence[str] = field(repr=False)
    state: QuantState = field(repr=False)
    filled: Mapping[str, str] = field(repr=False)
    ended: bool

    @property
    def sources(self) -> dict[str, TensorSpec]:
        """Every Hugging Face tensor before quantizing, quantizer state included."""
        return specs_of(self.bundles)


class Saver:
    """Saves one checkpoint, together with the other writers.

    Raises:
        UsageError: the scheme or policy is unknown, or the output is not empty.
    """

    def __init__(self, hf: HFModel, writers: Writers, target: Path, options: SaveOptions) -> None:
        check_name("base_model", options.base_model)
        self._hf, self.writers, self.options = hf, writers, options
        self._described_by = hf
        self.target = resolved_output(target)
        if hf.directory is not None:
            check_apart(hf.directory, self.target)
        writers.check_output(self.target, overwrite=options.overwrite)
        self.adapters = adapter_mode(options.adapter, options.adapter_alpha, options.adapter_base)
        self.remeasured = is_remeasured(options.weight_amax, self.adapters)
        self.takes_main_parameters = takes_main_parameters(options.weights)
        if self.takes_main_parameters and self.adapters is not None:
            raise UsageError(
                "weights=fp32_main and adapter.mode= exclude each other: the frozen weights have no main parameters"
            )
        self._companions = Companions.of(hf.directory)
        self.recipe = find_scheme(options.scheme, options.ignore, options.format)
        self._missing = missing_policy(options.missing_amax)
        self._mixed = mixed_policy(options.mixed_groups)
        self._finite = FiniteCheck(nonfinite_policy(options.nonfinite))

    def save(
        self,
        plan: Sequence[BundlePlan],
        stream: Stream,
        collect: Callable[[], QuantState],
        *,
        source: SourceFiles | SeveralSources | None = None,
        merge: Merge | None = None,
    ) -> ExportReport:
        """Writes the bundles of a plan. Collective if the writers are ranks of a live model.

        Args:
            stream: planned bundles → those that this process owns.
            collect: returns the per-tensor state; called if needed.
            source: the files that the bundles are read from, with which an interrupted export can continue. None for a
                live model, whose weights may have changed.
            merge: merges adapters into the bundles; None if there are none.
        """
        options, specs = self.options, specs_of(plan)
        state = collect() if self.recipe or options.quant_state else QuantState()
        casting = Casting.of(self._hf, specs, options.dtype)
        self._hf = casting.described(self._hf)

        def decided(casting: Casting, *, warn: bool) -> Finalizer:
            changed = None if merge is None else merge.changed
            parts = self._hf, plan, casting, self.recipe, state, self._missing, self._mixed
            return decide(*parts, warn=warn, changed=changed)

        finalizer = decided(casting, warn=self.writers.first)
        if self.takes_main_parameters:
            casting = casting.sparing(finalizer.written)
            finalizer = decided(casting, warn=False)
        finalizer.finite = self._finite
        carried = carried_specs(self._hf, required=not options.dry_run)
        files = self._files(bool(carried))
        if carried and carried_specs(self._hf, required=True) != carried:
            raise changed_meanwhile(self._hf.weights_directory)
        finalizer.ignore += ignored(self._hf)
        if self.recipe is not None:
            check_ignored(options.ignore, {*map(module_of, finalizer.outputs), *finalizer.ignore})
        packed = None if any(map(is_routed_expert, finalizer.quantized)) else self._hf.family.packed_experts
        packer = ExpertPacker(finalizer.output_specs, packed)
        weights = {name: spec for name, spec in specs.items() if not is_quantizer_state(name)}
        notes = [*self._hf.notes, *([] if merge is None else merge.notes)]
        directory = DirectoryPlan(
            target=self.target,
            companions=self._companions,
            sources=tuple(each for each in (source, files, self._described_by) if each is not None),
            config=self._hf.written,
            made_of=None if source is None else source.fingerprint,
            conversion=Conversion(
                finalizer,
                plan_layout({**packer.specs, **carried}, options.max_shard_bytes),
                sum(spec.nbytes for spec in (*weights.values(), *carried.values())),
                state,
                {**(options.record or {}), **({"notes": notes} if notes else {})},
                options.base_model,
            ),
            keys=[bundle.key for bundle in plan],
            sizes={bundle.key: BundleSize.of(bundle.specs) for bundle in plan if bundle.owner == self.writers.me},
            expected=lambda: self._expected(weights, carried),
            packer=packer if packed else None,
            state_shards=self._state_shards(state, specs) if options.quant_state else (),
            carried=lambda: carried_tensors(self._hf),
        )

        def make(done: frozenset[str], writer: BundleWriter) -> None:
            for bundle in stream([bundle for bundle in plan if bundle.key not in done]):
                writer.write(casting.bundle(bundle if merge is None else merge(bundle)))

        ended = self.writers.first
        if not options.dry_run:
            ended = write_directory(directory, self.writers, make, options).ended
        return ExportReport(
            self.recipe.name if self.recipe else "none",
            plan,
            finalizer.output_specs,
            directory.conversion.layout,
            finalizer.scheme_names,
            finalizer.ignore,
            state,
            finalizer.filled,
            ended,
        )

    def _files(self, weights: bool) -> SourceFiles | None:
        """What is read of the Hugging Face directory."""
        companions = self._companions
        names = [*companions.read, *(companions.weights if weights else ())]
        hashed = self.options.hash_source
        return None if companions.source is None else SourceFiles.of(companions.source, names, hashed=hashed)

    def _state_shards(self, state: QuantState, specs: Mapping[str, TensorSpec]) -> tuple[Shard]:
        if any(name.endswith(STORED_SCALES) for name in specs):
            raise UsageError("quant_state=True: FP8 parameters that are written unchanged have no amax to keep")
        folded = [name for name in {*specs, *state.amax} if name.endswith(PRE_QUANT_SCALE)]
        if folded:
            raise UsageError(
                f"quant_state=True: the state would not fit weights with {len(folded)} input scales folded into them:"
                f"{listing(sorted(folded))}\nExport without it, or disable AWQ and SmoothQuant and calibrate again"
            )
        return (plan_quant_state(state, specs, ModelIdentity.of(self._hf.written, specs)),)

    def _expected(
        self, planned: Mapping[str, TensorSpec], carried: Mapping[str, TensorSpec]
    ) -> dict[str, tuple[int, ...]]:
        """The shapes that transformers expects (if unknown, the planned ones), and those of carried tensors."""
        known = {name: TensorSpec.of(each) for name, each in (self._hf.file_tensors or {}).items()}
        expected = {**(known or planned), **carried}
        return {name: spec.shape for name, spec in expected.items()}
