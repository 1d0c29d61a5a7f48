"""AutoBridge: the façade over a Hugging Face directory and a live Megatron model."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from torch import Tensor, nn

from bridge.fill import fill_parameters, fill_quantizers
from bridge.hf_config import HFModel, read_hf_model
from bridge.parameters import Parameter, Quantizer, layer_pattern, unwrap, walk_parameters, walk_quantizers
from bridge.plan import BundlePlan, plan_export
from bridge.quant_state import collect_scalars, state_parameters
from bridge.ranks import current_ranks
from bridge.stored import FINAL_NORM_OF_HYBRID, StoredModel
from bridge.stream import stream_bundles
from bridge.torch_dist import DistCheckpoint
from export.checkpoint import SafetensorsCheckpoint
from export.finalizer import Bundle, Finalizer
from export.fused_scales import missing_policy
from export.layout import DEFAULT_SHARD_BYTES, Layout, plan_layout
from export.metadata import CONFIG_FILE, INDEX_FILE, carried_files, config_json, index_json
from export.packed_experts import ExpertPacker
from export.quant_state import QuantState
from export.schemes import find_scheme
from export.writer import ShardWriter, StagedDirectory, check_output
from mappings.errors import CheckpointError, listing
from mappings.names import is_routed_expert, module_of
from mappings.ranks import Axis, Ranks

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"  # in Megatron's names

_log = logging.getLogger("amaxbridge")

type Model = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did, or with `dry_run` would do: the same on every rank."""

    scheme: str
    bundles: Sequence[BundlePlan]
    layout: Layout
    quantized: Sequence[str]
    ignored: Sequence[str]
    state: QuantState


class AutoBridge:
    """Translates between a live Megatron model and Hugging Face checkpoints.

    Methods that take a model are collective: call them on every rank. `model` is the rank's model or list of
    virtual-pipeline chunks, wrapped or not.
    """

    def __init__(self, hf: HFModel, ranks: Ranks | None = None) -> None:
        self.hf = hf
        self._given_ranks = ranks

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, ranks: Ranks | None = None) -> Self:
        """A bridge for the architecture of a Hugging Face directory or hub name. No weights are read.

        Args:
            ranks: whom to talk to; default is Megatron's parallel state, or nobody where there is none.

        Raises:
            UsageError: not a model directory.
            UnknownArchitectureError: no family for its architecture.
        """
        return cls(read_hf_model(path), ranks)

    def collect_quant_state(self, model: Model) -> QuantState:
        """Amax and format of every enabled quantizer in Hugging Face names, reduced with max over the ranks.

        Per-tensor amax is the same on all ranks; per-channel and per-block amax is on the rank that owns the module.
        """
        chunks = unwrap(model)
        config = self._module_config(chunks)
        state = self._collect_scalars(chunks)
        tensors = list(state_parameters(self._quantizers(chunks)))
        amax = dict(state.amax)
        for bundle in self._stream(tensors, self._plan(tensors, config), config):
            amax |= bundle.state
        return replace(state, amax=amax)

    def export_hf_weights(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        """The unquantized Hugging Face tensors that this rank owns: together the ranks yield each tensor once.

        Experts come one by one, also those of a family whose files pack them.
        """
        chunks = unwrap(model)
        held, config = self._held(chunks), self._module_config(chunks)
        for bundle in self._stream(held, self._plan(held, config), config):
            yield from bundle.tensors.items()

    def load_hf_weights(self, model: Model) -> None:
        """Fills the model's parameters, this rank's shards, from the safetensors of the Hugging Face directory.

        Raises:
            UnmappedParameterError: parameters without a mapping.
            CheckpointError: a file or a tensor is missing.
            MappingError: a tensor does not have the shape that the model needs.
        """
        chunks = unwrap(model)
        parameters = [
            replace(each, name=_EMBEDDING) if self._tied and each.name == _OUTPUT else each
            for each in self._parameters(chunks)
        ]
        with SafetensorsCheckpoint(self.hf.directory, self.hf.family.packed_experts) as checkpoint:
            config = self._module_config(chunks)
            fill_parameters(parameters, checkpoint.read, self.hf.registry, config, self._ranks())

    def load_quant_state(self, model: Model, state: QuantState) -> None:
        """Sets the amax of the model's enabled quantizers, the mirror of `collect_quant_state`.

        Raises:
            AmaxError: the state has no value for an enabled static quantizer.
        """
        chunks = unwrap(model)
        config = self._module_config(chunks)
        fill_quantizers(self._quantizers(chunks), state, self.hf.registry, config, self._ranks())

    def save_hf_pretrained(
        self,
        model: Model,
        path: str | Path,
        *,
        scheme: str = "nvfp4",
        missing_amax: str = "error",
        overwrite: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        dry_run: bool = False,
    ) -> ExportReport:
        """Writes a Hugging Face checkpoint: compressed-tensors, or plain with `scheme="none"`.

        `missing_amax` says what to do about an amax that makes no scale: `error`, `from_weights` or `group_max`.

        All ranks must see `path` on one file system. Every rank writes the tensors it owns; nothing appears at
        `path` before all of it is written.

        Raises:
            UsageError: unknown scheme, no quantizers for it, or an output that is not empty.
            MappingError: parameters that have no mapping or do not fit; all are named.
            AmaxError: amax that are missing, zero, negative or not finite; all are named.
        """
        target = Path(path).absolute()
        check_output(target, overwrite=overwrite)
        find_scheme(scheme)
        chunks = unwrap(model)
        held, config = self._held(chunks), self._module_config(chunks)
        plan = self._plan(held, config)
        return self._save(
            plan,
            self._stream(held, plan, config),
            lambda: self._collect_scalars(chunks),
            target,
            scheme=scheme,
            missing_amax=missing_amax,
            max_shard_bytes=max_shard_bytes,
            dry_run=dry_run,
        )

    def convert_checkpoint(
        self,
        checkpoint: str | Path,
        path: str | Path,
        *,
        scheme: str = "nvfp4",
        missing_amax: str = "error",
        overwrite: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        dry_run: bool = False,
    ) -> ExportReport:
        """As `save_hf_pretrained`, from a Megatron distributed checkpoint: without Megatron, a model or a GPU.

        Several processes share the bundles; each reads what it writes, straight from the files. At any time a process
        holds one bundle.

        Raises:
            CheckpointError: not a distributed checkpoint, or one that is damaged.
        """
        target = Path(path).absolute()
        check_output(target, overwrite=overwrite)
        opened = DistCheckpoint(Path(checkpoint))
        family, hf_config = self.hf.family, self.hf.config
        hybrid = FINAL_NORM_OF_HYBRID in opened.tensors
        stored = StoredModel(opened, family.spelling(family.layer_pattern(hf_config) if hybrid else None))
        fields = (family.hybrid_config if hybrid else family.transformer_config)(hf_config)
        config = SimpleNamespace(**fields, vocab_size=hf_config["vocab_size"])
        quantizers = stored.quantizers()
        plan = self._plan([*stored.parameters(), *state_parameters(quantizers)], config)
        me = self._ranks().rank(Axis.WORLD)
        bundles = (
            Bundle.of(
                {
                    name: tensor
                    for part in bundle.parts
                    for name, tensor in part.mapping.join([stored.read(part.name)], config).items()
                }
            )
            for bundle in plan
            if bundle.owner == me
        )
        return self._save(
            plan,
            bundles,
            lambda: collect_scalars(quantizers, self.hf.registry, self._ranks()),
            target,
            scheme=scheme,
            missing_amax=missing_amax,
            max_shard_bytes=max_shard_bytes,
            dry_run=dry_run,
        )

    def _save(
        self,
        plan: Sequence[BundlePlan],
        bundles: Iterator[Bundle],
        collect: Callable[[], QuantState],
        target: Path,
        *,
        scheme: str,
        missing_amax: str,
        max_shard_bytes: int,
        dry_run: bool,
    ) -> ExportReport:
        """What every export does once it has a plan. `collect` is called when there is something to quantize."""
        chosen = find_scheme(scheme)
        state = collect() if chosen else QuantState()
        specs = {name: spec for bundle in plan for name, spec in bundle.specs.items()}
        finalizer = Finalizer(specs, chosen, state, missing=missing_policy(missing_amax))
        output = self.hf.registry.megatron_to_hf_lookup(_OUTPUT)
        if self._tied and output is not None:  # a Linear to every consumer, though it has no tensor of its own
            finalizer.ignore += map(module_of, output.targets)
        any_quantized = any(map(is_routed_expert, finalizer.quantized))
        packer = ExpertPacker(finalizer.output_specs, None if any_quantized else self.hf.family.packed_experts)
        layout = plan_layout(packer.specs, max_shard_bytes)
        self._warn(state, finalizer.filled)
        if not dry_run:
            self._write(bundles, finalizer, packer, layout, StagedDirectory(target))
        return ExportReport(scheme, plan, layout, finalizer.quantized, finalizer.ignore, state)

    def _write(
        self,
        bundles: Iterator[Bundle],
        finalizer: Finalizer,
        packer: ExpertPacker,
        layout: Layout,
        staged: StagedDirectory,
    ) -> None:
        ranks = self._ranks()
        first = ranks.rank(Axis.WORLD) == 0
        try:
            if first:
                staged.create(layout)
                self._write_small_files(staged, finalizer, layout)
            _barrier(ranks)
            writer = ShardWriter(staged.path, layout)
            try:
                for bundle in bundles:
                    for name, part, tensor in packer.pack(dict(finalizer.finalize(bundle))):
                        writer.write(name, tensor, part)
            finally:
                writer.close()
            _barrier(ranks)
            if first:
                staged.commit(layout)
            _barrier(ranks)
        except BaseException:
            if first:
                staged.discard()
            raise

    def _write_small_files(self, staged: StagedDirectory, finalizer: Finalizer, layout: Layout) -> None:
        for file in carried_files(self.hf.directory):
            staged.write_file(file.name, file.read_bytes())
        staged.write_file(CONFIG_FILE, config_json(self.hf.written, finalizer.quantization_config))
        index = index_json(layout)
        if index is not None:
            staged.write_file(INDEX_FILE, index)

    def _parameters(self, chunks: Sequence[nn.Module]) -> Iterator[Parameter]:
        return walk_parameters(chunks, self.hf.family.spelling(layer_pattern(chunks)))

    def _quantizers(self, chunks: Sequence[nn.Module]) -> Iterator[Quantizer]:
        return walk_quantizers(chunks, self.hf.family.spelling(layer_pattern(chunks)))

    def _held(self, chunks: Sequence[nn.Module]) -> list[Parameter]:
        """Everything of this rank that the plan moves: parameters, and quantizer state that follows them."""
        return [*self._parameters(chunks), *state_parameters(self._quantizers(chunks))]

    def _plan(self, held: Sequence[Parameter], config: Any) -> list[BundlePlan]:
        tied = frozenset({_OUTPUT}) if self._tied else frozenset[str]()
        return plan_export(held, self.hf.registry, config, self._ranks(), skip=tied)

    def _stream(self, held: Sequence[Parameter], plan: Sequence[BundlePlan], config: Any) -> Iterator[Bundle]:
        tensors = {parameter.name: parameter.tensor for parameter in held}
        return stream_bundles(plan, tensors, config, self._ranks())

    def _collect_scalars(self, chunks: Sequence[nn.Module]) -> QuantState:
        return collect_scalars(self._quantizers(chunks), self.hf.registry, self._ranks())

    def _module_config(self, chunks: Sequence[nn.Module]) -> Any:
        """The model's configuration as mappings read it; refuses a model that is not the one of config.json."""
        family, pattern = self.hf.family, layer_pattern(chunks)
        described = family.layer_pattern(self.hf.config)
        expected = (family.transformer_config if pattern is None else family.hybrid_config)(self.hf.config)
        config: Any = chunks[0].config
        unused = set[str]() if "-" in described else {"ffn_hidden_size"}
        differ = [
            f"{name}: the Megatron model has {found}, config.json gives {value}"
            for name, value in expected.items()
            if name not in unused and (found := _setting(config, name)) != value
        ]
        if pattern is not None and pattern.replace("|", "") != described:
            differ.append(f"hybrid_layer_pattern: the Megatron model has {pattern}, config.json gives {described}")
        if differ:
            raise CheckpointError(
                f"the Megatron model is not the one that {self.hf.directory} describes:{listing(differ)}"
            )
        return SimpleNamespace(
            **expected,
            transformer_impl=getattr(config, "transformer_impl", "local"),
            vocab_size=self.hf.config["vocab_size"],
            padded_vocab_size=getattr(chunks[0], "vocab_size", None),
        )

    @property
    def _tied(self) -> bool:
        """Whether the output layer is the embedding; a pipeline's last stage has a copy of it all the same."""
        return bool(self.hf.config.get("tie_word_embeddings"))

    def _ranks(self) -> Ranks:
        return self._given_ranks or current_ranks()

    def _warn(self, state: QuantState, filled: Mapping[str, str]) -> None:
        if self._ranks().rank(Axis.WORLD) != 0:
            return
        if state.divergent:
            rows = [f"{name}: {values}" for name, values in state.divergent.items()]
            _log.warning("%d amax differ between ranks; the maximum is used:%s", len(rows), listing(rows))
        if filled:
            rows = [f"{name}: from {source}" for name, source in filled.items()]
            _log.warning("%d amax were missing or unusable and are filled:%s", len(rows), listing(rows))


def _setting(config: Any, name: str) -> Any:
    """A field of Megatron's configuration; `moe_layer_freq`, which may be a number N for every Nth layer, as a list."""
    value = getattr(config, name)
    if name == "moe_layer_freq" and isinstance(value, int):
        return [int(layer % value == 0) for layer in range(config.num_layers)]
    return value


def _barrier(ranks: Ranks) -> None:
    ranks.all_gather_object(Axis.WORLD, None)
