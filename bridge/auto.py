"""AutoBridge: the façade over a Hugging Face directory and a live Megatron model."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor, nn

from amaxbridge.bridge.hf import OUTPUT_LAYER, HFModel, read_hf_model
from amaxbridge.bridge.live.bundle_stream import join_bundle, stream_bundles
from amaxbridge.bridge.live.collect_amax import collect_scalars, state_parameters
from amaxbridge.bridge.live.compressed_weights import (
    check_unpackable,
    faults_of_groups,
    faults_of_ranks,
    packing_of,
    shared_scales,
    without_packing,
)
from amaxbridge.bridge.live.fill_model import fill_parameters, fill_quantizers, mappings_of
from amaxbridge.bridge.live.live_adapters import LiveScales, live_scales
from amaxbridge.bridge.live.model_walk import (
    Parameter,
    Quantizer,
    layer_pattern,
    unwrap,
    walk_all_quantizers,
    walk_parameters,
)
from amaxbridge.bridge.live.process_ranks import current_ranks
from amaxbridge.bridge.live.quantized_parameters import PlainTensors, as_stored
from amaxbridge.bridge.live.refit import RefitOptions, tensors_once
from amaxbridge.bridge.plan.adapters import (
    AdapterMode,
    Merge,
    adapters_of,
    merging,
    packed_with_adapters,
)
from amaxbridge.bridge.plan.export_plan import BundlePlan, plan_export, plan_stored
from amaxbridge.bridge.plan.left_behind import check_nothing_is_left
from amaxbridge.bridge.plan.quantizer_gate import check_quantizers, refusals
from amaxbridge.bridge.plan.stored_blocks import check_blocks, stored_formats
from amaxbridge.bridge.save import ExportReport, Saver, Stream
from amaxbridge.bridge.save_adapters import save_adapters
from amaxbridge.bridge.stored.adapted_checkpoint import adapted_model, holds_model
from amaxbridge.bridge.stored.adapter_settings import AdapterSettings, ModelOptSettings, adapter_settings
from amaxbridge.bridge.stored.config_from_arguments import model_of_arguments
from amaxbridge.bridge.stored.hf_weights import HFWeights
from amaxbridge.bridge.stored.identification import check_described, check_kind, stored_model
from amaxbridge.bridge.stored.main_parameters import FP32_MAIN, main_parameters
from amaxbridge.bridge.stored.open_checkpoint import files_of, open_checkpoint
from amaxbridge.bridge.stored.stored_model import StoredModel
from amaxbridge.bridge.weight_dtypes import dtype_option, is_rounded
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.dequantized import DequantizedCheckpoint
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.shard_layout import DTYPE_NAMES
from amaxbridge.export.disk.source_files import SeveralSources, SourceFiles
from amaxbridge.export.disk.staging import ALONE, Share
from amaxbridge.export.hub import push_to_hub
from amaxbridge.export.model_free.input_directory import check_spared
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.output.writing_processes import Apart, Together
from amaxbridge.export.schemes import SCHEMES, Recipe
from amaxbridge.export.schemes.targets import is_targeted
from amaxbridge.mappings.adapters import AdaptedRegistry, is_adapter
from amaxbridge.mappings.errors import CheckpointError, UnknownArchitectureError, UsageError, listing
from amaxbridge.mappings.families import CLASSIFIERS, FAMILIES
from amaxbridge.mappings.family_file import FamilySource
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.ranks import LOCAL, Axis, Ranks
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.output_options import SaveKeywords, SaveOptions, options_from

if TYPE_CHECKING:
    from amaxbridge.bridge.import_hf import ImportReport
    from amaxbridge.bridge.megatron.build_model import ModelClass

_log = logging.getLogger("amaxbridge")
_EMBEDDING = "embedding.word_embeddings.weight"

type Model = nn.Module | Sequence[nn.Module]


class AutoBridge:
    """Translates between a live Megatron model and Hugging Face checkpoints.

    Methods that take a model are collective: call them on every rank. `model` is the rank's model or list of
    virtual-pipeline chunks, wrapped or not.
    """

    def __init__(self, hf: HFModel, ranks: Ranks | None = None) -> None:
        self.hf = hf
        self._given_ranks = ranks

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hf.family.architectures[0]}, {self.hf.source})"

    @classmethod
    def from_hf_pretrained(
        cls,
        path: str | Path,
        *,
        family: FamilySource | None = None,
        architecture: str | None = None,
        num_labels: int | None = None,
        revision: str | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """A bridge for the architecture of a Hugging Face directory or hub name. No weights are read.

        Args:
            family: a family of your own, for a model that is not known here: its file, or the ModelFamily. The file
                runs. See docs/custom-models.md.
            architecture, num_labels: for a reward model, a critic or a classifier of the model in config.json, its own
                architecture (`Qwen3ForSequenceClassification`), and the rows of its head. See docs/reward-models.md.
            revision: branch, tag or commit of a model on the Hub, which `OWNER/MODEL@REVISION` says, too.
            ranks: the ranks to communicate with; default: those of Megatron's parallel state, or none without it.

        Raises:
            UsageError: not a model directory, `family` is none that can be used, or `architecture` no classifier.
            UnknownArchitectureError: no family has its architecture.
        """
        hf = read_hf_model(path, family, architecture=architecture, num_labels=num_labels, revision=revision)
        return cls(hf, ranks)

    @classmethod
    def can_handle(cls, path: str | Path, *, revision: str | None = None, family: FamilySource | None = None) -> bool:
        """True if a family has the architecture of a Hugging Face directory or hub name.

        Raises:
            UsageError: there is no such directory or model, or its config.json is damaged.
        """
        try:
            read_hf_model(path, family, revision=revision)
        except UnknownArchitectureError:
            return False
        return True

    @staticmethod
    def list_supported_models() -> list[str]:
        """The architectures that some family has, as config.json names them."""
        return sorted({name for family in (*FAMILIES, *CLASSIFIERS) for name in family.architectures})

    @classmethod
    def import_ckpt(
        cls,
        hf_path: str | Path,
        path: str | Path,
        *,
        revision: str | None = None,
        family: FamilySource | None = None,
        dtype: str | torch.dtype = "bfloat16",
        model_class: str | None = None,
        overwrite: bool = False,
        hash_source: bool = False,
        **sizes: int | None,
    ) -> "ImportReport":
        """Writes a Megatron checkpoint of a Hugging Face directory or hub name, quantizers and amax included.

        Collective. Parallel sizes are those of Megatron's parallel state; without one, it is set up for the time of
        the import, in the processes of torchrun or in this one alone.

        Args:
            path: the directory to write.
            dtype: of the parameters: bfloat16, float16 or float32.
            model_class: `gpt` or `hybrid`; None for GPTModel if the family has one.
            overwrite, hash_source: as in `SaveOptions`.
            sizes: `tp`, `pp`, `vpp`, `ep`, `etp`, where there is no parallel state.

        Raises:
            UsageError, CheckpointError, MappingError: as `import_hf`.
        """
        from amaxbridge.bridge import megatron  # late: Megatron takes many seconds
        from amaxbridge.bridge.import_hf import import_hf

        hf = read_hf_model(hf_path, family, revision=revision)
        with megatron.parallel_state_of(**sizes):
            return import_hf(
                hf,
                Path(path),
                dtype=dtype_option("dtype", dtype),
                model_class=model_class,
                overwrite=overwrite,
                hash_source=hash_source,
            )

    def to_megatron_model(
        self,
        *,
        load_weights: bool = True,
        dtype: str | torch.dtype = "bfloat16",
        model_class: "ModelClass | None" = None,
    ) -> list[nn.Module]:
        """A new Megatron model: this rank's chunks, more than one with a virtual pipeline. Collective.

        Needs Megatron's parallel state. Layers are Megatron-Core's own, without Transformer Engine.

        Args:
            load_weights: False for random weights.
            dtype: of the parameters: bfloat16, float16 or float32.
            model_class: `gpt` or `hybrid`; None for GPTModel if the family has one.

        Raises:
            UsageError: Megatron does not compute the model, or refuses its sizes.
            CheckpointError, MappingError: as `load_hf_weights`.
        """
        from amaxbridge.bridge import megatron  # late: Megatron takes many seconds

        kind = dtype_option("dtype", dtype)
        chunks: list[nn.Module] = []
        chunks += megatron.build_chunks(self.hf, dtype=kind, initialize=not load_weights, model_class=model_class)
        if load_weights:
            self.load_hf_weights(chunks)
        return chunks

    @classmethod
    def from_megatron_checkpoint(
        cls,
        checkpoint: str | Path,
        *,
        architecture: str | None = None,
        vocab_size: int | None = None,
        family: FamilySource | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """A bridge for the model of a Megatron checkpoint, as described by the arguments that training saved in it.

        Args:
            architecture: the Hugging Face architecture, if the arguments fit several.
            vocab_size: the tokenizer's vocabulary size, if Megatron only saved the padded one.
            family, ranks: as in `from_hf_pretrained`.

        Raises:
            UsageError: the arguments are missing, or fit no family, or fit several.
            CheckpointError: not a checkpoint of Megatron's training.
        """
        hf = model_of_arguments(given_path(checkpoint), architecture=architecture, vocab_size=vocab_size, family=family)
        return cls(hf, ranks)

    def collect_quant_state(self, model: Model) -> QuantState:
        """Amax and format of every enabled quantizer in Hugging Face names, reduced with max over the ranks.

        Per-tensor amax is the same on all ranks; per-channel and per-block amax is on the rank that owns the module.
        """
        chunks = unwrap(model)
        config, quantizers = self._model_config(chunks), list(self._all_quantizers(chunks))
        self._check_quantizers(quantizers, self._ranks(), ())
        state = collect_scalars(quantizers, self.hf.registry, config, self._ranks())
        tensors = list(state_parameters(quantizers))
        amax = dict(state.amax)
        for bundle in self._stream(tensors, config, self._plan(tensors, config)):
            amax |= bundle.state
        return replace(state, amax=amax)

    def export_hf_weights(
        self,
        model: Model,
        *,
        scheme: str | Recipe | None = None,
        missing_amax: str = "error",
        mixed_groups: str = "error",
        adapter: str | None = None,
        weight_amax: str = "stored",
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the Hugging Face tensors that this rank owns; together the ranks yield each tensor once.

        With a scheme these are, bit for bit, the tensors of the checkpoint that `save_hf_pretrained` would write,
        without the disk. For a serving engine that gets new weights after every step of training, `Refit` plans this
        once. Memory holds only the bundles in exchange, and what they are made into. A rank that stops iterating blocks
        the others. Experts come one by one, even for a family whose files pack them; tensors beside the language model
        are not included. `examples/refit.py` shows the use.

        Args:
            scheme, missing_amax, mixed_groups: as in `SaveOptions`; without a scheme, the weights are unquantized.
            adapter, weight_amax: as in `SaveOptions`; adapters are merged or refused.
        """
        options = RefitOptions.of(
            scheme, missing_amax=missing_amax, mixed_groups=mixed_groups, adapter=adapter, weight_amax=weight_amax
        )
        yield from tensors_once(self, unwrap(model), options)

    def load_hf_weights(self, model: Model) -> None:
        """Fills this rank's shards of the model's parameters from the safetensors of the Hugging Face directory.

        Collective. A compressed-tensors checkpoint is dequantized on the way. `import_hf` restores its amax too.

        Raises:
            UsageError: Megatron does not compute the model that config.json describes.
            UnmappedParameterError: parameters have no mapping; all of them are named.
            CheckpointError: a file or a tensor is missing, `model` is another model, or has no place for a tensor.
            MappingError: a tensor does not have the shape that the model needs.
        """
        with self.open_weights() as weights:
            self.load_from(weights, model)

    def open_weights(self) -> AbstractContextManager[DequantizedCheckpoint]:
        """Opens the tensors of the Hugging Face directory."""
        return self.hf.open_weights()

    def load_from(self, weights: DequantizedCheckpoint, model: Model) -> dict[str, str]:
        """As `load_hf_weights`, from opened tensors.

        Returns:
            The tensors of this rank that are rounded to the dtype of their parameter → both dtypes.
        """
        chunks = unwrap(model)
        self._check_computes(chunks)
        parameters = [
            replace(each, name=_EMBEDDING) if self.hf.tied and each.name == OUTPUT_LAYER else each
            for each in self._parameters(chunks)
        ]
        mappings, ranks = mappings_of(parameters, self.hf.registry), self._ranks()
        taken = ranks.all_gather_object(Axis.WORLD, [name for mapping in mappings for name in mapping.targets])
        check_nothing_is_left(self.hf, weights, chain.from_iterable(taken), warn=ranks.rank(Axis.WORLD) == 0)
        fill_parameters(parameters, mappings, weights.read, self._model_config(chunks), ranks)
        held = weights.specs() or {}
        return {
            name: f"{DTYPE_NAMES[held[name].dtype]} to {DTYPE_NAMES[parameter.tensor.dtype]}"
            for parameter, mapping in zip(parameters, mappings, strict=True)
            for name in mapping.targets
            if name in held and is_rounded(held[name].dtype, parameter.tensor.dtype)
        }

    def load_quant_state(self, model: Model, state: QuantState) -> None:
        """Sets the amax of the model's enabled quantizers: the inverse of `collect_quant_state`.

        Raises:
            AmaxError: the state has no value for an enabled static quantizer.
        """
        chunks = unwrap(model)
        config = self._model_config(chunks)
        enabled = [each for each in self._all_quantizers(chunks) if each.module.is_enabled]
        fill_quantizers(enabled, state, self.hf.registry, config, self._ranks())

    def save_hf_weights(self, model: Model, path: str | Path, **options: Unpack[SaveKeywords]) -> ExportReport:
        """As `save_hf_pretrained`, with plain weights unless `scheme` says otherwise: a whole directory."""
        keywords: SaveKeywords = {"scheme": "none", **options}
        return self.save_hf_pretrained(model, path, **keywords)

    def export_ckpt(
        self, checkpoint: str | Path, path: str | Path, *, share: Share = ALONE, **options: Unpack[SaveKeywords]
    ) -> ExportReport:
        """Another name of `convert_checkpoint`."""
        return self.convert_checkpoint(checkpoint, path, share=share, **options)

    @staticmethod
    def push_to_hub(directory: str | Path, name: str, *, private: bool | None = None, overwrite: bool = False) -> str:
        """Uploads what an export wrote as a model on the Hub, and returns its address; see `export.hub.push_to_hub`."""
        return push_to_hub(directory, name, private=private, overwrite=overwrite)

    def save_hf_pretrained(self, model: Model, path: str | Path, **options: Unpack[SaveKeywords]) -> ExportReport:
        """Writes a Hugging Face checkpoint: compressed-tensors, or plain with `scheme="none"`.

        All ranks must see `path` on one file system. Every rank writes the tensors that it owns; nothing appears
        at `path` before everything is written.

        Args:
            options: see `SaveOptions`.

        Raises:
            UsageError: the scheme is unknown, the model has no quantizers for it, or the output is not empty.
            MappingError: parameters have no mapping or do not fit; all are named.
            AmaxError: amax are missing, zero, negative or not finite; all are named.
        """
        saver = Saver(self.hf, Together(self._ranks()), Path(path), options_from(SaveOptions, options))
        if saver.takes_main_parameters:
            raise UsageError(
                "weights=fp32_main is for checkpoints: save one with its optimizer, and give it to convert_checkpoint"
            )
        chunks, asked = unwrap(model), saver.options
        if asked.adapter_base is not None:
            raise UsageError("adapter.base= is for checkpoints of adapters alone: a live model has its weights")
        only = saver.adapters is AdapterMode.ONLY
        held = self._held_adapters(chunks) if only else self._held(chunks, saver.recipe)
        config = self._model_config(chunks)
        stream = partial(self._stream, held, config)
        if only:
            plan = self._plan(held, config, AdaptedRegistry(self.hf.registry))
            scales = self._scales(chunks, asked.adapter_alpha)
            return save_adapters(self.hf, saver, plan, adapters_of(plan, scales.scale_of), stream)
        plan, merge = self._plan_merged(held, config, chunks, saver.adapters, asked.adapter_alpha, saver.remeasured)
        return saver.save(plan, stream, partial(self._collect_all, chunks, plan), merge=merge)

    def convert_checkpoint(
        self, checkpoint: str | Path, path: str | Path, *, share: Share = ALONE, **options: Unpack[SaveKeywords]
    ) -> ExportReport:
        """As `save_hf_pretrained`, from a checkpoint of Megatron's training: without Megatron, a model or a GPU.

        Processes that share the bundles need not run at the same time: each reads the tensors of its bundles from the
        files, writes them, and returns; the last one moves everything into place. A process holds one bundle at a
        time. Calling an interrupted export again continues it.

        Args:
            share: the share of this process. All must see checkpoint and output on one file system.

        Raises:
            CheckpointError: not a checkpoint of Megatron's training, a damaged one, or not the model of config.json.
        """
        checkpoint, path = given_path(checkpoint), resolved_output(path)
        check_spared(checkpoint, path)
        saver = Saver(self.hf, Apart(share), path, options_from(SaveOptions, options))
        files = files_of(checkpoint, hashed=saver.options.hash_source)
        opened = open_checkpoint(files.directory)  # training may have saved a later iteration by now
        if share.rank == 0:
            for note in self.hf.notes:
                _log.warning("%s", note)
        source: SourceFiles | SeveralSources = files
        if saver.takes_main_parameters:
            check_kind(opened)
            opened, source = main_parameters(opened), SeveralSources((files,), FP32_MAIN)
        stored, asked = stored_model(opened, self.hf), saver.options
        if saver.adapters is None:
            quantizers = self._described(stored, saver.recipe)
            plan = self._plan_stored([*stored.parameters(), *state_parameters(quantizers)], self.hf.registry, share)
            return self._save_stored(saver, plan, stored, quantizers, share, source)
        check_kind(opened, adapters=True)
        settings = adapter_settings(opened.directory, asked.adapter_alpha)
        if saver.adapters is AdapterMode.ONLY:
            return self._save_stored_adapters(saver, stored, settings, share, files)
        with adapted_model(self.hf, stored, asked.adapter_base, hashed=asked.hash_source) as model:
            base = model.base
            quantizers = [] if isinstance(base, HFWeights) else self._described(base, saver.recipe, model.parameters())
            held = [*model.parameters(), *state_parameters(quantizers)]
            plan = self._plan_stored(held, AdaptedRegistry(self.hf.registry), share)
            plan, merge = merging(plan, settings.scale_of, remeasured=saver.remeasured)
            several = SeveralSources((files, *model.files), merge.fingerprint)
            return self._save_stored(saver, plan, model, quantizers, share, several, merge)

    def _save_stored_adapters(
        self,
        saver: Saver,
        stored: StoredModel,
        settings: AdapterSettings | ModelOptSettings,
        share: Share,
        files: SourceFiles,
    ) -> ExportReport:
        if holds_model(stored):
            check_described(stored, self.hf, adapters=True)
        self._check_quantizers([each for each in stored.all_quantizers() if is_adapter(each.name)], LOCAL, None)
        held = [each for each in stored.parameters() if is_adapter(each.name)]
        plan = self._plan_stored(held, AdaptedRegistry(self.hf.registry), share)
        adapters = adapters_of(plan, settings.scale_of)
        source = SeveralSources((files,), "adapters only")
        return save_adapters(self.hf, saver, plan, adapters, self._stored_stream(stored, share), source)

    def _described(
        self, stored: StoredModel, recipe: Recipe | None, changed: Sequence[Parameter] = ()
    ) -> list[Quantizer]:
        """The quantizers of a checkpoint; refuses one that is not the model of config.json, or cannot be exported.

        Args:
            changed: the parameters, if some are those of adapters to be merged.
        """
        quantizers = stored.all_quantizers()
        faults = [*stored.packing_faults, *faults_of_groups(stored.packings.items(), self.hf.registry)]
        check_unpackable(faults + packed_with_adapters(stored.packings, changed))
        check_described(stored, self.hf, adapters=bool(changed))
        ignore = None if recipe is None else recipe.ignore
        self._check_quantizers(quantizers, LOCAL, ignore)
        stored.is_plain = partial(self._is_plain, ignore=ignore)
        return _outside_adapters(quantizers)

    def _plan_stored(self, held: Sequence[Parameter], registry: MappingRegistry, share: Share) -> list[BundlePlan]:
        return plan_stored(held, registry, self.hf.model_config, share.world, skip=self.hf.without_tensor)

    def _save_stored(
        self,
        saver: Saver,
        plan: Sequence[BundlePlan],
        tensors: Mapping[str, Tensor],
        quantizers: Sequence[Quantizer],
        share: Share,
        source: SourceFiles | SeveralSources,
        merge: Merge | None = None,
    ) -> ExportReport:
        return saver.save(
            plan,
            self._stored_stream(tensors, share),
            lambda: collect_scalars(quantizers, self.hf.registry, self.hf.model_config, LOCAL),
            source=source,
            merge=merge,
        )

    def _stored_stream(self, tensors: Mapping[str, Tensor], share: Share) -> Stream:
        config = self.hf.model_config
        return lambda needed: (join_bundle(bundle, tensors, config) for bundle in needed if bundle.owner == share.rank)

    def _parameters(self, chunks: Sequence[nn.Module]) -> Iterator[Parameter]:
        return walk_parameters(chunks, self.hf.family.spelling(layer_pattern(chunks)))

    def _all_quantizers(self, chunks: Sequence[nn.Module]) -> Iterator[Quantizer]:
        return walk_all_quantizers(chunks, self.hf.family.spelling(layer_pattern(chunks)))

    def _check_quantizers(self, found: Iterable[Quantizer], ranks: Ranks, ignore: Sequence[str] | None) -> None:
        """Refuses quantizers that compute what no export writes, on any rank.

        Args:
            ignore: modules that are written unquantized; None for all.
        """
        reports = ranks.all_gather_object(Axis.WORLD, list(refusals(found)))
        check_quantizers([each for report in reports for each in report], partial(self._is_plain, ignore=ignore))

    def _is_plain(self, quantizer: str, *, ignore: Sequence[str] | None) -> bool:
        """True if the weights of a quantizer are written unquantized."""
        if ignore is None:
            return True
        mapping = self.hf.registry.megatron_to_hf_lookup(f"{quantizer}._amax")
        return mapping is not None and all(is_targeted(module_of(module_of(name)), ignore) for name in mapping.targets)

    def _held(self, chunks: Sequence[nn.Module], recipe: Recipe | None) -> list[Parameter]:
        """This rank's tensors that the plan moves: parameters, and quantizer state that follows them.

        Raises:
            UsageError: the recipe keeps FP8 parameters, but no scheme writes some of them; all are named.
        """
        parameters, quantizers = list(self._parameters(chunks)), list(self._all_quantizers(chunks))
        ignore = None if recipe is None else recipe.ignore
        self._check_quantizers(quantizers, self._ranks(), ignore)
        parameters, faults = without_packing(parameters, quantizers, partial(self._is_plain, ignore=ignore))
        quantizers = _outside_adapters(quantizers)
        packings = {each.name: found for each in quantizers if (found := packing_of(each)) is not None}
        faults += [*faults_of_groups(packings.items(), self.hf.registry), *packed_with_adapters(packings, parameters)]
        own = faults, shared_scales(quantizers, self.hf.registry)
        reports = self._ranks().all_gather_object(Axis.WORLD, own)
        of_all = [fault for each, _ in reports for fault in each]
        check_unpackable([*dict.fromkeys(of_all), *faults_of_ranks(scales for _, scales in reports)])
        if recipe is not None and recipe.adopts_codes:
            names = {quantizer.name for quantizer in quantizers if quantizer.module.is_enabled}
            parameters, problems = as_stored(parameters, self.hf.registry, recipe.ignore, names)
            of_all = [each for rank in self._ranks().all_gather_object(Axis.WORLD, problems) for each in rank]
            if of_all:
                raise UsageError(
                    f"scheme=auto: {len(of_all)} parameters have forms that no scheme writes:{listing(of_all)}\n"
                    "scheme=none writes them dequantized"
                )
        return [*parameters, *state_parameters(quantizers)]

    def _held_adapters(self, chunks: Sequence[nn.Module]) -> list[Parameter]:
        """This rank's tensors of adapters."""
        inside = [each for each in self._all_quantizers(chunks) if is_adapter(each.name)]
        self._check_quantizers(inside, self._ranks(), None)
        return [each for each in self._parameters(chunks) if is_adapter(each.name)]

    def _plan(
        self, held: Sequence[Parameter], config: ModelConfig, registry: MappingRegistry | None = None
    ) -> list[BundlePlan]:
        plan = plan_export(held, registry or self.hf.registry, config, self._ranks(), skip=self.hf.without_tensor)
        check_blocks(plan, config)
        return plan

    def _plan_merged(
        self,
        held: Sequence[Parameter],
        config: ModelConfig,
        chunks: Sequence[nn.Module],
        mode: AdapterMode | None,
        alpha: float | None,
        remeasured: bool,
    ) -> tuple[list[BundlePlan], Merge | None]:
        """The plan, and what merges adapters into its bundles if they are wanted."""
        if mode is None:
            return self._plan(held, config), None
        plan = self._plan(held, config, AdaptedRegistry(self.hf.registry))
        return merging(plan, self._scales(chunks, alpha).scale_of, remeasured=remeasured)

    def _scales(self, chunks: Sequence[nn.Module], alpha: float | None) -> LiveScales:
        return live_scales(chunks, self._ranks(), alpha, self.hf.family.spelling(layer_pattern(chunks)))

    def _stream(self, held: Sequence[Parameter], config: ModelConfig, plan: Sequence[BundlePlan]) -> Iterator[Bundle]:
        return stream_bundles(plan, PlainTensors(held), config, self._ranks())

    def _quantizers(self, chunks: Sequence[nn.Module]) -> list[Quantizer]:
        """The quantizers of the model itself, whose state is collected."""
        return _outside_adapters(self._all_quantizers(chunks))

    def _collect_scalars(self, chunks: Sequence[nn.Module]) -> QuantState:
        return collect_scalars(self._quantizers(chunks), self.hf.registry, self.hf.model_config, self._ranks())

    def _collect_all(self, chunks: Sequence[nn.Module], plan: Sequence[BundlePlan]) -> QuantState:
        """The per-tensor state, with the formats of weights that the plan moves as codes and scales.

        Training quantized their inputs in the same format.
        """
        state, stored = self._collect_scalars(chunks), stored_formats(plan)
        inputs = {module: SCHEMES[form].input_format for module, form in stored.items()}
        inputs_of_all = {**(state.inputs or {}), **{module: form for module, form in inputs.items() if form}}
        return replace(state, formats={**state.formats, **stored}, inputs=inputs_of_all)

    def _model_config(self, chunks: Sequence[nn.Module]) -> ModelConfig:
        """The sizes of the live model; refuses one that is not the model of config.json."""
        pattern, described = layer_pattern(chunks), self.hf.family.layer_pattern(self.hf.config)
        expected = self.hf.family.module_config(self.hf.config, pattern)
        config: Any = chunks[0].config
        unused = set[str]() if "-" in described else {"ffn_hidden_size"}
        differ = _differences(config, {name: value for name, value in expected.items() if name not in unused})
        if pattern is not None and pattern.replace("|", "") != described:
            differ.append(f"hybrid_layer_pattern: the Megatron model has {pattern}, config.json gives {described}")
        self._refuse(differ)
        return replace(
            self.hf.model_config,
            transformer_impl=ModelConfig.of(config).transformer_impl,
            padded_vocab_size=getattr(chunks[0], "vocab_size", None),
        )

    def _check_computes(self, chunks: Sequence[nn.Module]) -> None:
        """Refuses a model that does not compute what config.json describes."""
        self.hf.family.check_buildable(self.hf.config)
        self._refuse(_differences(chunks[0].config, self.hf.family.computed.read(self.hf.config)))

    def _refuse(self, differ: Sequence[str]) -> None:
        if differ:
            raise CheckpointError(
                f"the Megatron model is not the one that {self.hf.source} describes:{listing(differ)}"
            )

    def _ranks(self) -> Ranks:
        return self._given_ranks or current_ranks()


def _outside_adapters(quantizers: Iterable[Quantizer]) -> list[Quantizer]:
    """Those that are not inside an adapter; there, the gate lets disabled ones pass alone."""
    return [each for each in quantizers if not is_adapter(each.name)]


def _differences(config: Any, expected: Mapping[str, Any]) -> list[str]:
    """One line for each field of Megatron's configuration that is not as expected."""
    return [
        f"{name}: the Megatron model has {found}, config.json gives {value}"
        for name, value in expected.items()
        if (found := _setting(config, name)) != value
    ]


def _setting(config: Any, name: str) -> Any:
    """A field of Megatron's configuration; `moe_layer_freq` always as a list; a number N means every Nth layer.

    An MTP layer that all depths share counts once.
    """
    value = getattr(config, name)
    if name == "mtp_num_layers" and value and getattr(config, "mtp_use_repeated_layer", False):
        return 1
    if name == "moe_layer_freq" and isinstance(value, int):
        return [int(layer % value == 0) for layer in range(config.num_layers)]
    return value
