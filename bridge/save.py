"""Saving: what every export does once it has a plan, whether its bundles come from a live model or from files."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from bridge.hf_config import HFModel
from bridge.plan import BundlePlan
from export.finalizer import Bundle, Finalizer
from export.fused_scales import missing_policy
from export.layout import DEFAULT_SHARD_BYTES, Layout, plan_layout
from export.metadata import CONFIG_FILE, INDEX_FILE, carried_files, config_json, index_json
from export.packed_experts import ExpertPacker
from export.quant_state import QuantState
from export.schemes import find_scheme
from export.writer import ShardWriter, StagedDirectory, check_output
from mappings.errors import listing
from mappings.names import is_routed_expert, module_of
from mappings.ranks import Axis, Ranks

OUTPUT_LAYER = "output_layer.weight"
"""Megatron's name."""

_log = logging.getLogger("amaxbridge")


class SaveOptions(TypedDict, total=False):
    """How a checkpoint is saved; `Saver` has the defaults.

    Args:
        scheme: `nvfp4` and so on, `auto`, or `none` for plain weights.
        missing_amax: what to do about an amax that makes no scale: `error`, `from_weights` or `group_max`.
        overwrite: replace what is at the output.
        max_shard_bytes: of one safetensors file, but for a single tensor that is larger.
        dry_run: plan and check everything, write nothing.
    """

    scheme: str
    missing_amax: str
    overwrite: bool
    max_shard_bytes: int
    dry_run: bool


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did, or with `dry_run` would do: the same on every rank."""

    scheme: str
    bundles: Sequence[BundlePlan]
    layout: Layout
    quantized: Sequence[str]
    ignored: Sequence[str]
    state: QuantState


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
        scheme: str = "nvfp4",
        missing_amax: str = "error",
        overwrite: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        dry_run: bool = False,
    ) -> None:
        self._hf, self._ranks = hf, ranks
        self._target = target.absolute()
        check_output(self._target, overwrite=overwrite)
        self._scheme, self._recipe = scheme, find_scheme(scheme)
        self._missing = missing_policy(missing_amax)
        self._max_shard_bytes, self._dry_run = max_shard_bytes, dry_run

    def save(
        self, plan: Sequence[BundlePlan], bundles: Iterator[Bundle], collect: Callable[[], QuantState]
    ) -> ExportReport:
        """Writes the bundles; those that this rank owns come from `bundles`. Collective.

        Args:
            collect: gives the per-tensor state; called when there is something to quantize.
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
            self._write(bundles, finalizer, packer, layout)
        return ExportReport(self._scheme, plan, layout, finalizer.quantized, finalizer.ignore, state)

    @property
    def _first(self) -> bool:
        return self._ranks.rank(Axis.WORLD) == 0

    def _write(self, bundles: Iterator[Bundle], finalizer: Finalizer, packer: ExpertPacker, layout: Layout) -> None:
        staged = StagedDirectory(self._target)
        try:
            if self._first:
                staged.create(layout)
                self._write_small_files(staged, finalizer, layout)
            self._barrier()
            writer = ShardWriter(staged.path, layout)
            try:
                for bundle in bundles:
                    for name, part, tensor in packer.pack(dict(finalizer.finalize(bundle))):
                        writer.write(name, tensor, part)
            finally:
                writer.close()
            self._barrier()
            if self._first:
                staged.commit(layout)
            self._barrier()
        except BaseException:
            if self._first:
                staged.discard()
            raise

    def _write_small_files(self, staged: StagedDirectory, finalizer: Finalizer, layout: Layout) -> None:
        for file in carried_files(self._hf.directory):
            staged.write_file(file.name, file.read_bytes())
        staged.write_file(CONFIG_FILE, config_json(self._hf.written, finalizer.quantization_config))
        index = index_json(layout)
        if index is not None:
            staged.write_file(INDEX_FILE, index)

    def _barrier(self) -> None:
        self._ranks.all_gather_object(Axis.WORLD, None)


def _warn(state: QuantState, filled: Mapping[str, str]) -> None:
    if state.divergent:
        rows = [f"{name}: {values}" for name, values in state.divergent.items()]
        _log.warning("%d amax differ between ranks; the maximum is used:%s", len(rows), listing(rows))
    if filled:
        rows = [f"{name}: from {source}" for name, source in filled.items()]
        _log.warning("%d amax were missing or unusable and are filled:%s", len(rows), listing(rows))
