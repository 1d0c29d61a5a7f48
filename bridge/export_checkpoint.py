"""From a checkpoint of Megatron's training to a Hugging Face directory: without Megatron, a model or a process group.

Processes share the bundles and never talk: each computes the same plan from the same files, and joins and writes those
that it owns.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.live.bundle_stream import join_bundle
from amaxbridge.bridge.live.collect_amax import collect_scalars, state_parameters
from amaxbridge.bridge.live.compressed_weights import check_unpackable, faults_of_groups
from amaxbridge.bridge.live.model_walk import Parameter, Quantizer
from amaxbridge.bridge.plan.adapters import (
    AdapterMode,
    Merge,
    adapters_of,
    merging,
    outside_adapters,
    packed_with_adapters,
)
from amaxbridge.bridge.plan.export_plan import BundlePlan, plan_stored
from amaxbridge.bridge.plan.quantizer_gate import check_quantizers_of_ranks, written_plain
from amaxbridge.bridge.save import ExportReport, Saver, Stream
from amaxbridge.bridge.save_adapters import save_adapters
from amaxbridge.bridge.stored.adapted_checkpoint import adapted_model, holds_model
from amaxbridge.bridge.stored.adapter_settings import AdapterSettings, ModelOptSettings, adapter_settings
from amaxbridge.bridge.stored.hf_weights import HFWeights
from amaxbridge.bridge.stored.identification import check_described, check_kind, stored_model
from amaxbridge.bridge.stored.main_parameters import FP32_MAIN, main_parameters
from amaxbridge.bridge.stored.open_checkpoint import files_of, open_checkpoint
from amaxbridge.bridge.stored.stored_model import StoredModel
from amaxbridge.export.disk.source_files import SeveralSources, SourceFiles
from amaxbridge.export.disk.staging import Share
from amaxbridge.export.model_free.input_directory import check_spared
from amaxbridge.export.output.writing_processes import Apart
from amaxbridge.mappings.adapters import AdaptedRegistry, is_adapter
from amaxbridge.mappings.ranks import LOCAL
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.output_options import SaveOptions

_log = logging.getLogger("amaxbridge")


def export_checkpoint(hf: HFModel, checkpoint: Path, path: Path, share: Share, options: SaveOptions) -> ExportReport:
    """See `AutoBridge.convert_checkpoint`."""
    check_spared(checkpoint, path)
    saver = Saver(hf, Apart(share), path, options)
    files = files_of(checkpoint, hashed=options.hash_source)
    opened = open_checkpoint(files.directory)  # training may have saved a later iteration by now
    if share.rank == 0:
        for note in hf.notes:
            _log.warning("%s", note)
    source: SourceFiles | SeveralSources = files
    if saver.takes_main_parameters:
        check_kind(opened)
        opened, source = main_parameters(opened), SeveralSources((files,), FP32_MAIN)
    stored, export = stored_model(opened, hf), _Export(hf, saver, share)
    if saver.adapters is None:
        quantizers = export.described(stored)
        plan = export.plan([*stored.parameters(), *state_parameters(quantizers)], hf.registry)
        return export.save(plan, stored, quantizers, source)
    check_kind(opened, adapters=True)
    settings = adapter_settings(opened.directory, options.adapter_alpha)
    if saver.adapters is AdapterMode.ONLY:
        return export.save_adapters(stored, settings, files)
    with adapted_model(hf, stored, options.adapter_base, hashed=options.hash_source) as model:
        base = model.base
        quantizers = [] if isinstance(base, HFWeights) else export.described(base, model.parameters())
        plan = export.plan([*model.parameters(), *state_parameters(quantizers)], AdaptedRegistry(hf.registry))
        plan, merge = merging(plan, settings.scale_of, remeasured=saver.remeasured)
        several = SeveralSources((files, *model.files), merge.fingerprint)
        return export.save(plan, model, quantizers, several, merge)


@dataclass(frozen=True, slots=True)
class _Export:
    """One process's part of an export."""

    hf: HFModel
    saver: Saver
    share: Share

    def described(self, stored: StoredModel, changed: Sequence[Parameter] = ()) -> list[Quantizer]:
        """The quantizers of a checkpoint; refuses one that is not the model of config.json, or cannot be exported.

        Args:
            changed: the parameters, if some are those of adapters to be merged.
        """
        registry, recipe, quantizers = self.hf.registry, self.saver.recipe, stored.all_quantizers()
        faults = [*stored.packing_faults, *faults_of_groups(stored.packings.items(), registry)]
        check_unpackable(faults + packed_with_adapters(stored.packings, changed))
        check_described(stored, self.hf, adapters=bool(changed))
        ignore = None if recipe is None else recipe.ignore
        check_quantizers_of_ranks(quantizers, registry, LOCAL, ignore)
        stored.is_plain = written_plain(registry, ignore)
        return outside_adapters(quantizers)

    def plan(self, held: Sequence[Parameter], registry: MappingRegistry) -> list[BundlePlan]:
        return plan_stored(held, registry, self.hf.model_config, self.share.world, skip=self.hf.without_tensor)

    def save(
        self,
        plan: Sequence[BundlePlan],
        tensors: Mapping[str, Tensor],
        quantizers: Sequence[Quantizer],
        source: SourceFiles | SeveralSources,
        merge: Merge | None = None,
    ) -> ExportReport:
        return self.saver.save(
            plan,
            self._stream(tensors),
            lambda: collect_scalars(quantizers, self.hf.registry, self.hf.model_config, LOCAL),
            source=source,
            merge=merge,
        )

    def save_adapters(
        self, stored: StoredModel, settings: AdapterSettings | ModelOptSettings, files: SourceFiles
    ) -> ExportReport:
        if holds_model(stored):
            check_described(stored, self.hf, adapters=True)
        inside = [each for each in stored.all_quantizers() if is_adapter(each.name)]
        check_quantizers_of_ranks(inside, self.hf.registry, LOCAL, None)
        held = [each for each in stored.parameters() if is_adapter(each.name)]
        plan = self.plan(held, AdaptedRegistry(self.hf.registry))
        adapters, source = adapters_of(plan, settings.scale_of), SeveralSources((files,), "adapters only")
        return save_adapters(self.hf, self.saver, plan, adapters, self._stream(stored), source)

    def _stream(self, tensors: Mapping[str, Tensor]) -> Stream:
        config, rank = self.hf.model_config, self.share.rank
        return lambda needed: (join_bundle(bundle, tensors, config) for bundle in needed if bundle.owner == rank)
