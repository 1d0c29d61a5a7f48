"""Saving: what every export does once it has a plan, whether its bundles come from a live model or from files."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from bridge.hf_config import HFModel
from bridge.plan import BundlePlan
from export.finalizer import Bundle, Finalizer
from export.fused_scales import missing_policy
from export.layout import DEFAULT_SHARD_BYTES, Layout, plan_layout
from export.metadata import CONFIG_FILE, INDEX_FILE, carried_files, config_json, index_json
from export.packed_experts import ExpertPacker
from export.progress import NoProgress, Progress
from export.quant_state import QuantState
from export.record import RECORD_FILE, record_json
from export.schemes import Recipe, find_scheme
from export.writer import ShardWriter, StagedDirectory, check_output, plan_fingerprint
from mappings.errors import AmaxbridgeError, listing
from mappings.names import is_routed_expert, module_of
from mappings.ranks import Axis, Ranks
from mappings.tensors import TensorSpec

type Stream = Callable[[Sequence[BundlePlan]], Iterator[Bundle]]

OUTPUT_LAYER = "output_layer.weight"
"""Megatron's name."""

_log = logging.getLogger("amaxbridge")


class SaveOptions(TypedDict, total=False):
    """How a checkpoint is saved; `Saver` has the defaults.

    Args:
        scheme: as `find_scheme` takes it: `nvfp4` and so on, `auto`, `none` for plain weights, or a recipe.
        missing_amax: what to do about an amax that makes no scale: `error`, `from_weights` or `group_max`.
        overwrite: replace what is at the output.
        max_shard_bytes: of one safetensors file, but for a single tensor that is larger.
        dry_run: plan and check everything, write nothing.
        progress: is told how far it is.
        record: how the export was asked for, kept in `amaxbridge.json` with the versions; None for no such file.
    """

    scheme: str | Recipe | None
    missing_amax: str
    overwrite: bool
    max_shard_bytes: int
    dry_run: bool
    progress: Progress
    record: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did, or with `dry_run` would do: the same on every rank.

    Args:
        scheme: as users gave it.
        written: every tensor, experts one by one even where the files pack them.
        quantized: module → the name of its scheme.
        ignored: the linear modules that are left as they are.
        filled: amax that were missing or unusable: quantizer → what filled it.
    """

    scheme: str
    bundles: Sequence[BundlePlan]
    written: Mapping[str, TensorSpec]
    layout: Layout
    quantized: Mapping[str, str]
    ignored: Sequence[str]
    state: QuantState
    filled: Mapping[str, str]

    @property
    def sources(self) -> dict[str, TensorSpec]:
        """Every Hugging Face tensor that goes in, quantizer state included."""
        return {name: spec for bundle in self.bundles for name, spec in bundle.specs.items()}


class Saver:
    """Saves one checkpoint, together with the same on the other ranks. Options as in `SaveOptions`.

    Raises:
        UsageError: an unknown scheme or policy, or an output that is not empty.
    """

    def __init__(
        self,
        hf: HFModel,
        ranks: Ranks,
        target: Path,
        *,
        scheme: str | Recipe | None = "nvfp4",
        missing_amax: str = "error",
        overwrite: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        dry_run: bool = False,
        progress: Progress | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self._hf, self._ranks = hf, ranks
        self._target = target.absolute()
        check_output(self._target, overwrite=overwrite)
        self._recipe = find_scheme(scheme)
        self._missing = missing_policy(missing_amax)
        self._max_shard_bytes, self._dry_run = max_shard_bytes, dry_run
        self._progress, self._record = progress or NoProgress(), record

    def save(
        self,
        plan: Sequence[BundlePlan],
        stream: Stream,
        collect: Callable[[], QuantState],
        *,
        source: str | None = None,
    ) -> ExportReport:
        """Writes the bundles of a plan. Collective.

        Args:
            stream: gives those of some planned bundles that this rank owns.
            collect: gives the per-tensor state; called when there is something to quantize.
            source: names what the bundles are made from; with it, an interrupted export can go on. None for a live
                model, whose weights may be others the next time.
        """
        state = collect() if self._recipe else QuantState()
        specs = {name: spec for bundle in plan for name, spec in bundle.specs.items()}
        finalizer = Finalizer(specs, self._recipe, state, missing=self._missing)
        output = self._hf.registry.megatron_to_hf_lookup(OUTPUT_LAYER)
        if self._hf.tied and output is not None:  # a Linear to every consumer, though it has no tensor of its own
            finalizer.ignore += map(module_of, output.targets)
        any_quantized = any(map(is_routed_expert, finalizer.quantized))
        packer = ExpertPacker(finalizer.output_specs, None if any_quantized else self._hf.family.packed_experts)
        layout = plan_layout(packer.specs, self._max_shard_bytes)
        if self._first:
            _warn(state, finalizer.filled)
        if not self._dry_run:
            fingerprint = source and plan_fingerprint(source, finalizer.fingerprint, layout)
            self._write(plan, stream, finalizer, packer, layout, fingerprint)
        return ExportReport(
            self._recipe.name if self._recipe else "none",
            plan,
            finalizer.output_specs,
            layout,
            finalizer.scheme_names,
            finalizer.ignore,
            state,
            finalizer.filled,
        )

    @property
    def _first(self) -> bool:
        return self._ranks.rank(Axis.WORLD) == 0

    def _write(
        self,
        plan: Sequence[BundlePlan],
        stream: Stream,
        finalizer: Finalizer,
        packer: ExpertPacker,
        layout: Layout,
        fingerprint: str | None,
    ) -> None:
        with StagedDirectory(self._target, fingerprint) as staged:
            done = self._from_first(lambda: staged.open(layout))
            needed = [bundle for bundle in plan if bundle.key not in done]
            mine = self._begin(plan, done)
            writer = ShardWriter(staged.path, layout, self._ranks.rank(Axis.WORLD))
            try:
                for bundle in stream(needed):
                    for name, first, tensor in packer.pack(dict(finalizer.finalize(bundle))):
                        writer.write(name, tensor, first)
                    writer.done(bundle.key)
                    planned = mine[bundle.key]
                    self._progress.advance(tensors=len(planned.specs), nbytes=planned.nbytes)
            finally:
                writer.close()
            self._barrier()
            if self._first:
                self._write_small_files(staged, finalizer, layout)
                staged.commit()
            self._barrier()

    def _begin(self, plan: Sequence[BundlePlan], done: frozenset[str]) -> dict[str, BundlePlan]:
        """The bundles that this rank owns, announced."""
        me = self._ranks.members(Axis.WORLD)[self._ranks.rank(Axis.WORLD)]
        mine = {bundle.key: bundle for bundle in plan if bundle.owner == me}
        self._progress.begin(
            tensors=sum(len(bundle.specs) for key, bundle in mine.items() if key not in done),
            nbytes=sum(bundle.nbytes for bundle in mine.values()),
            kept=sum(bundle.nbytes for key, bundle in mine.items() if key in done),
        )
        return mine

    def _write_small_files(self, staged: StagedDirectory, finalizer: Finalizer, layout: Layout) -> None:
        for file in carried_files(self._hf.directory):
            staged.write_file(file.name, file.read_bytes())
        staged.write_file(CONFIG_FILE, config_json(self._hf.written, finalizer.quantization_config))
        if self._record is not None:
            staged.write_file(RECORD_FILE, record_json(self._record))
        index = index_json(layout)
        if index is not None:
            staged.write_file(INDEX_FILE, index)

    def _from_first(self, make: Callable[[], frozenset[str]]) -> frozenset[str]:
        """What the first rank makes, or the error that it meets, on every rank."""
        made: frozenset[str] | AmaxbridgeError = frozenset()
        if self._first:
            try:
                made = make()
            except AmaxbridgeError as error:
                made = error
        made = self._ranks.all_gather_object(Axis.WORLD, made)[0]
        if isinstance(made, AmaxbridgeError):
            raise made
        return made

    def _barrier(self) -> None:
        self._ranks.all_gather_object(Axis.WORLD, None)


def _warn(state: QuantState, filled: Mapping[str, str]) -> None:
    if state.divergent:
        rows = [f"{name}: {values}" for name, values in state.divergent.items()]
        _log.warning("%d amax differ between ranks; the maximum is used:%s", len(rows), listing(rows))
    if filled:
        rows = [f"{name}: from {source}" for name, source in filled.items()]
        _log.warning("%d amax were missing or unusable and are filled:%s", len(rows), listing(rows))
