"""A live Megatron model in the terms of an export: its tensors, quantizers, sizes and plan, on all ranks together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.live.bundle_stream import stream_bundles
from amaxbridge.bridge.live.collect_amax import collect_scalars, state_parameters
from amaxbridge.bridge.live.compressed_weights import (
    check_unpackable,
    faults_of_groups,
    faults_of_ranks,
    packing_of,
    shared_scales,
    without_packing,
)
from amaxbridge.bridge.live.live_adapters import LiveScales, live_scales
from amaxbridge.bridge.live.model_walk import Parameter, Quantizer, layer_pattern, walk_all_quantizers, walk_parameters
from amaxbridge.bridge.live.quantized_parameters import PlainTensors, as_stored
from amaxbridge.bridge.plan.adapters import AdapterMode, Merge, merging, outside_adapters, packed_with_adapters
from amaxbridge.bridge.plan.export_plan import BundlePlan, plan_export
from amaxbridge.bridge.plan.quantizer_gate import check_quantizers_of_ranks, written_plain
from amaxbridge.bridge.plan.stored_blocks import check_blocks, stored_formats
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.schemes import SCHEMES, Recipe
from amaxbridge.mappings.adapters import AdaptedRegistry, is_adapter
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.ranks import Axis, Ranks
from amaxbridge.mappings.registry import MappingRegistry


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A rank's model. Every method that returns a plan, a state or tensors of all ranks is collective.

    Args:
        hf: the model in Hugging Face's terms.
        chunks: its virtual-pipeline chunks, unwrapped.
        ranks: the ranks to communicate with.
    """

    hf: HFModel
    chunks: Sequence[nn.Module]
    ranks: Ranks

    def parameters(self) -> Iterator[Parameter]:
        """As `walk_parameters`, in the mappings' names."""
        return walk_parameters(self.chunks, self._spelling)

    def all_quantizers(self) -> Iterator[Quantizer]:
        """As `walk_all_quantizers`, in the mappings' names."""
        return walk_all_quantizers(self.chunks, self._spelling)

    def held(self, recipe: Recipe | None) -> list[Parameter]:
        """This rank's tensors that the plan moves: parameters, and quantizer state that follows them.

        Raises:
            UsageError: the recipe keeps FP8 parameters, but no scheme writes some of them; all are named.
        """
        parameters, quantizers = list(self.parameters()), list(self.all_quantizers())
        ignore = None if recipe is None else recipe.ignore
        check_quantizers_of_ranks(quantizers, self.hf.registry, self.ranks, ignore)
        parameters, faults = without_packing(parameters, quantizers, written_plain(self.hf.registry, ignore))
        quantizers = outside_adapters(quantizers)
        packings = {each.name: found for each in quantizers if (found := packing_of(each)) is not None}
        faults += [*faults_of_groups(packings.items(), self.hf.registry), *packed_with_adapters(packings, parameters)]
        own = faults, shared_scales(quantizers, self.hf.registry)
        reports = self.ranks.all_gather_object(Axis.WORLD, own)
        of_all = [fault for each, _ in reports for fault in each]
        check_unpackable([*dict.fromkeys(of_all), *faults_of_ranks(scales for _, scales in reports)])
        if recipe is not None and recipe.adopts_codes:
            names = {quantizer.name for quantizer in quantizers if quantizer.module.is_enabled}
            parameters, problems = as_stored(parameters, self.hf.registry, recipe.ignore, names)
            of_all = [each for rank in self.ranks.all_gather_object(Axis.WORLD, problems) for each in rank]
            if of_all:
                raise UsageError(
                    f"scheme=auto: {len(of_all)} parameters have forms that no scheme writes:{listing(of_all)}\n"
                    "scheme=none writes them dequantized"
                )
        return [*parameters, *state_parameters(quantizers)]

    def held_adapters(self) -> list[Parameter]:
        """This rank's tensors of adapters."""
        inside = [each for each in self.all_quantizers() if is_adapter(each.name)]
        check_quantizers_of_ranks(inside, self.hf.registry, self.ranks, None)
        return [each for each in self.parameters() if is_adapter(each.name)]

    def plan(
        self, held: Sequence[Parameter], config: ModelConfig, registry: MappingRegistry | None = None
    ) -> list[BundlePlan]:
        """The bundles of all ranks; `registry` maps adapters, too, where they are wanted."""
        plan = plan_export(held, registry or self.hf.registry, config, self.ranks, skip=self.hf.without_tensor)
        check_blocks(plan, config)
        return plan

    def plan_merged(
        self,
        held: Sequence[Parameter],
        config: ModelConfig,
        mode: AdapterMode | None,
        alpha: float | None,
        *,
        remeasured: bool,
    ) -> tuple[list[BundlePlan], Merge | None]:
        """The plan, and what merges adapters into its bundles if they are wanted."""
        if mode is None:
            return self.plan(held, config), None
        plan = self.plan(held, config, AdaptedRegistry(self.hf.registry))
        return merging(plan, self.adapter_scales(alpha).scale_of, remeasured=remeasured)

    def adapter_scales(self, alpha: float | None) -> LiveScales:
        """How strongly its adapters act; `alpha` where their modules do not say it."""
        return live_scales(self.chunks, self.ranks, alpha, self._spelling)

    def stream(self, held: Sequence[Parameter], config: ModelConfig, plan: Sequence[BundlePlan]) -> Iterator[Bundle]:
        """Yields the bundles that this rank owns, joined."""
        return stream_bundles(plan, PlainTensors(held), config, self.ranks)

    def quantizers(self) -> list[Quantizer]:
        """The quantizers of the model itself, whose state is collected."""
        return outside_adapters(self.all_quantizers())

    def collect_state(self, plan: Sequence[BundlePlan]) -> QuantState:
        """The per-tensor state, with the formats of weights that the plan moves as codes and scales.

        Training quantized their inputs in the same format.
        """
        state = collect_scalars(self.quantizers(), self.hf.registry, self.hf.model_config, self.ranks)
        stored = stored_formats(plan)
        inputs = {module: SCHEMES[form].input_format for module, form in stored.items()}
        inputs_of_all = {**(state.inputs or {}), **{module: form for module, form in inputs.items() if form}}
        return replace(state, formats={**state.formats, **stored}, inputs=inputs_of_all)

    def config(self) -> ModelConfig:
        """The sizes of the live model; refuses one that is not the model of config.json."""
        pattern, described = layer_pattern(self.chunks), self.hf.family.layer_pattern(self.hf.config)
        expected = self.hf.family.module_config(self.hf.config, pattern)
        config: Any = self.chunks[0].config
        unused = set[str]() if "-" in described else {"ffn_hidden_size"}
        differ = _differences(config, {name: value for name, value in expected.items() if name not in unused})
        if pattern is not None and pattern.replace("|", "") != described:
            differ.append(f"hybrid_layer_pattern: the Megatron model has {pattern}, config.json gives {described}")
        self._refuse(differ)
        return replace(
            self.hf.model_config,
            transformer_impl=ModelConfig.of(config).transformer_impl,
            padded_vocab_size=getattr(self.chunks[0], "vocab_size", None),
        )

    def check_computes(self) -> None:
        """Refuses a model that does not compute what config.json describes."""
        self.hf.family.check_buildable(self.hf.config)
        self._refuse(_differences(self.chunks[0].config, self.hf.family.computed.read(self.hf.config)))

    def _refuse(self, differ: Sequence[str]) -> None:
        if differ:
            raise CheckpointError(
                f"the Megatron model is not the one that {self.hf.source} describes:{listing(differ)}"
            )

    @property
    def _spelling(self) -> Callable[[str], str]:
        return self.hf.family.spelling(layer_pattern(self.chunks))


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
