"""AutoBridge: the façade over a Hugging Face directory and a live Megatron model."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

import torch
from torch import Tensor, nn

from amaxbridge.bridge.export_checkpoint import export_checkpoint
from amaxbridge.bridge.hf import OUTPUT_LAYER, HFModel, read_hf_model
from amaxbridge.bridge.live.collect_amax import collect_scalars, state_parameters
from amaxbridge.bridge.live.fill_model import fill_parameters, fill_quantizers, mappings_of
from amaxbridge.bridge.live.live_model import LiveModel
from amaxbridge.bridge.live.model_walk import (
    unwrap,
)
from amaxbridge.bridge.live.process_ranks import current_ranks
from amaxbridge.bridge.live.refit import RefitOptions, tensors_once
from amaxbridge.bridge.plan.adapters import (
    AdapterMode,
    adapters_of,
)
from amaxbridge.bridge.plan.left_behind import check_nothing_is_left
from amaxbridge.bridge.plan.quantizer_gate import check_quantizers_of_ranks
from amaxbridge.bridge.save import ExportReport, Saver
from amaxbridge.bridge.save_adapters import save_adapters
from amaxbridge.bridge.stored.config_from_arguments import model_of_arguments
from amaxbridge.bridge.weight_dtypes import dtype_option, is_rounded
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.dequantized import DequantizedCheckpoint
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.shard_layout import DTYPE_NAMES
from amaxbridge.export.disk.staging import ALONE, Share
from amaxbridge.export.hub import push_to_hub
from amaxbridge.export.output.writing_processes import Together
from amaxbridge.export.schemes import Recipe
from amaxbridge.mappings.adapters import AdaptedRegistry
from amaxbridge.mappings.errors import UnknownArchitectureError, UsageError
from amaxbridge.mappings.families import CLASSIFIERS, FAMILIES
from amaxbridge.mappings.family_file import FamilySource
from amaxbridge.mappings.ranks import Axis, Ranks
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
        live = self.live_model(model)
        config, quantizers = live.config(), list(live.all_quantizers())
        check_quantizers_of_ranks(quantizers, self.hf.registry, live.ranks, ())
        state = collect_scalars(quantizers, self.hf.registry, config, live.ranks)
        tensors = list(state_parameters(quantizers))
        amax = dict(state.amax)
        for bundle in live.stream(tensors, config, live.plan(tensors, config)):
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
        yield from tensors_once(self.live_model(model), options)

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
        live = self.live_model(model)
        live.check_computes()
        parameters = [
            replace(each, name=_EMBEDDING) if self.hf.tied and each.name == OUTPUT_LAYER else each
            for each in live.parameters()
        ]
        mappings, ranks = mappings_of(parameters, self.hf.registry), live.ranks
        taken = ranks.all_gather_object(Axis.WORLD, [name for mapping in mappings for name in mapping.targets])
        check_nothing_is_left(self.hf, weights, chain.from_iterable(taken), warn=ranks.rank(Axis.WORLD) == 0)
        fill_parameters(parameters, mappings, weights.read, live.config(), ranks)
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
        live = self.live_model(model)
        config = live.config()
        enabled = [each for each in live.all_quantizers() if each.module.is_enabled]
        fill_quantizers(enabled, state, self.hf.registry, config, live.ranks)

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
        live, asked = self.live_model(model), saver.options
        if asked.adapter_base is not None:
            raise UsageError("adapter.base= is for checkpoints of adapters alone: a live model has its weights")
        only = saver.adapters is AdapterMode.ONLY
        held = live.held_adapters() if only else live.held(saver.recipe)
        config = live.config()
        stream = partial(live.stream, held, config)
        if only:
            plan = live.plan(held, config, AdaptedRegistry(self.hf.registry))
            scales = live.adapter_scales(asked.adapter_alpha)
            return save_adapters(self.hf, saver, plan, adapters_of(plan, scales.scale_of), stream)
        plan, merge = live.plan_merged(held, config, saver.adapters, asked.adapter_alpha, remeasured=saver.remeasured)
        return saver.save(plan, stream, partial(live.collect_state, plan), merge=merge)

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
        return export_checkpoint(
            self.hf, given_path(checkpoint), resolved_output(path), share, options_from(SaveOptions, options)
        )

    def live_model(self, model: Model) -> LiveModel:
        """This rank's model in the terms of an export."""
        return LiveModel(self.hf, unwrap(model), self._ranks())

    def _ranks(self) -> Ranks:
        return self._given_ranks or current_ranks()
