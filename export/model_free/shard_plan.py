"""The plan of a model-free run, made from headers alone: what is read, what is made from it, and where it lies."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import MissingAmax, MixedGroups
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.architectures.facts import GUESS, MEANINGS, Architecture, Guess
from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.export.model_free.converters.chain import ConverterChain
from amaxbridge.export.model_free.converters.conversion import decide, weight_dtype
from amaxbridge.export.model_free.converters.kept_modules import kept_modules
from amaxbridge.export.model_free.converters.quantized_source import QuantizedSource, check_plain
from amaxbridge.export.model_free.inverse_weight_maps import InverseWeightMap
from amaxbridge.export.model_free.source_bundles import SourceBundle, read_bundles
from amaxbridge.export.output.finalizer import CACHE_SCALES, Finalizer
from amaxbridge.export.output.finished_directory import BundleSize
from amaxbridge.export.schemes import Recipe, Scheme
from amaxbridge.export.schemes.targets import is_named
from amaxbridge.mappings.amax import GLOBAL_AMAX, LEARNED_POST, LEARNED_PRE, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import CheckpointError, MappingError, UsageError, listing
from amaxbridge.mappings.fused_groups import group_of, groups_among
from amaxbridge.mappings.names import is_routed_expert, kind_of, module_of
from amaxbridge.mappings.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The work, bundle by bundle.

    Args:
        bundles: bundles in the order of the output files.
        finalizer: decides what is made from each tensor.
        layout: the output files.
        state: per-channel and per-block quantizer state by name.
    """

    bundles: Sequence[SourceBundle]
    finalizer: Finalizer
    layout: Layout
    state: Mapping[str, Tensor]

    @property
    def modules(self) -> set[str]:
        """Every module that has tensors in the source."""
        return {module_of(name) for bundle in self.bundles for name in bundle.specs}

    @property
    def sizes(self) -> dict[str, BundleSize]:
        """The size of each bundle, by its key."""
        return {bundle.key: BundleSize.of(bundle.specs) for bundle in self.bundles}

    def block_amax(self, bundle: SourceBundle) -> dict[str, Tensor]:
        """The part of `state` that belongs to a bundle."""
        modules = [module_of(name) for name in bundle.specs if name.endswith(".weight")]
        names = (module + suffix for module in modules for suffix in (WEIGHT_QUANTIZER, LEARNED_POST, LEARNED_PRE))
        return {name: self.state[name] for name in names if name in self.state}

    @property
    def incomplete_groups(self) -> list[str]:
        """Fused groups that lack a member that the same group has in another layer."""
        modules = [module_of(name) for bundle in self.bundles for name in bundle.specs if name.endswith(".weight")]
        groups = [group.members for group in groups_among(modules)]
        full: dict[tuple[str, ...], set[str]] = {}
        for members in groups:
            full.setdefault(_layer_of(members[0]), set()).update(member.rpartition(".")[2] for member in members)
        return [
            f"{', '.join(members)}: without {', '.join(sorted(lacking))}"
            for members in groups
            if (lacking := full[_layer_of(members[0])] - {member.rpartition(".")[2] for member in members})
        ]


def plan_shards(
    maps: Mapping[str, InverseWeightMap],
    files: Mapping[str, SafetensorsFile],
    recipe: Recipe | None,
    state: QuantState | None,
    config: Mapping[str, Any],
    knowledge: Architecture | Guess = GUESS,
    *,
    source: QuantizedSource | None = None,
    chain: ConverterChain | None = None,
    missing: MissingAmax = MissingAmax.ERROR,
    mixed: MixedGroups = MixedGroups.ERROR,
) -> ShardPlan:
    """Plans the output files of some maps.

    Args:
        files: path → the opened file.
        config: config.json, as far as it is known.
        knowledge: what is known of the architecture.
        source: the quantized modules of the files; None if there are none.
        chain: converters of others, in place of `source`.

    Raises:
        CheckpointError: the source is not whole, or not for the converters.
        MappingError: tensors that the architecture does not explain, or weights that cannot be quantized; all are
            named.
        UsageError: the scheme cannot work on this checkpoint, or the state is of another model.
        AmaxError: amax that are missing or make no scale; all are named.
    """
    shapes = {name: tensor.spec.shape for file in files.values() for name, tensor in file.tensors.items()}
    knowledge, conversion = knowledge.with_axes_of(shapes), None
    if source is not None:
        names = [name for wanted in maps.values() for inside in wanted.values() for name in inside]
        wanted = recipe if state is None else None  # a state asks for the bytes that its amax make
        conversion = decide(source, wanted, names, knowledge=knowledge, dtype=weight_dtype(config))
    kept: Mapping[str, Scheme] = {} if conversion is None else conversion.kept_modules
    bundles = read_bundles(maps, files, conversion=conversion, chain=chain, experts=knowledge.experts_in)
    if not _quantizes_experts(bundles, recipe, state, kept):
        bundles = read_bundles(maps, files, conversion=conversion, chain=chain)
    specs: dict[str, TensorSpec] = {}
    for bundle in bundles:
        twice = specs.keys() & bundle.specs.keys()
        if twice:
            raise CheckpointError(f"{bundle.output}: {len(twice)} tensors would be made twice:{listing(sorted(twice))}")
        specs |= bundle.specs
    if chain is not None:
        kept = kept_modules(specs, chain.quantization(config.get("quantization_config")))
    check_plain(specs, kept)
    if isinstance(knowledge, Architecture) and recipe is not None:
        plain = {
            name: spec
            for name, spec in specs.items()
            if module_of(name) not in kept and not name.endswith(CACHE_SCALES)
        }
        _check_known(knowledge, plain, recipe, state)
    scalars, tensors = _by_granularity(state, specs)
    finalizer = Finalizer(
        specs | {name: TensorSpec.of(each) for name, each in tensors.items()},
        recipe,
        scalars,
        missing=missing,
        kept=kept,
        knowledge=knowledge,
        mixed=mixed,
    )
    contents: dict[str, dict[str, TensorSpec]] = {}
    for bundle in bundles:
        for name in bundle.specs:
            contents.setdefault(bundle.output, {}).update(finalizer.outputs[name])
    return ShardPlan(bundles, finalizer, Layout.of(contents), tensors)


def _check_known(
    architecture: Architecture, specs: Mapping[str, TensorSpec], recipe: Recipe, state: QuantState | None
) -> None:
    """Checks every tensor against what is known of the architecture, before any is read.

    Raises:
        MappingError: tensors that are unknown, of another shape, or in a layout that cannot be quantized.
    """
    unknown = [
        name for name in specs if architecture.fact(name) is None and not is_named(module_of(name), recipe.ignore)
    ]
    if unknown:
        raise MappingError(
            f"{len(unknown)} tensors are not known of {architecture.name}:{listing(unknown)}\n"
            "Name their modules in ignore to carry them over unquantized, or give architecture=guess"
        )
    misfits = [found for name, spec in specs.items() if (found := architecture.misfits(name, spec.shape))]
    if misfits:
        raise MappingError(
            f"{len(misfits)} tensors do not fit config.json:{listing(misfits)}\nGive the config.json of this model"
        )
    if state is not None:
        return
    asked = [
        f"{name}: {meaning}"
        for name in specs
        if (fact := architecture.fact(name)) is not None
        and (meaning := MEANINGS.get(fact.role)) is not None
        and recipe.scheme_of(module_of(name), None, architecture.stays_unquantized) is not None
    ]
    if asked:
        raise MappingError(
            f"{len(asked)} weights of {architecture.name} cannot be quantized:{listing(asked)}\n"
            "Name their modules in ignore to leave them unquantized"
        )


def _quantizes_experts(
    bundles: Sequence[SourceBundle], recipe: Recipe | None, state: QuantState | None, kept: Collection[str]
) -> bool:
    if any(map(is_routed_expert, kept)):
        return True
    modules = (module_of(name) for bundle in bundles for name in bundle.specs if name.endswith(".weight"))
    return recipe is not None and any(recipe.scheme_of(each, state) for each in modules if is_routed_expert(each))


def _by_granularity(
    state: QuantState | None, specs: Mapping[str, TensorSpec]
) -> tuple[QuantState | None, dict[str, Tensor]]:
    """Splits the state into per-tensor amax (the largest of each per-channel or per-block amax) and the rest."""
    if state is None:
        return None, {}
    strangers = sorted(module for module in state.formats if not _is_there(module, specs))
    if strangers:
        raise UsageError(
            f"the quantizer state has {len(strangers)} of {len(state.formats)} modules that the checkpoint does not "
            f"have:{listing(strangers)}\nGive the state of this model"
        )
    tensors = {name: amax for name, amax in state.amax.items() if amax.numel() > 1}
    scalars = {name: amax for name, amax in state.amax.items() if name not in tensors}
    for name, amax in tensors.items():
        if name.endswith(WEIGHT_QUANTIZER):
            scalars.setdefault(name.removesuffix(WEIGHT_QUANTIZER) + GLOBAL_AMAX, amax.max())
    return replace(state, amax=scalars), tensors


def _is_there(module: str, specs: Mapping[str, TensorSpec]) -> bool:
    """True if the quantized module has a weight; a quantizer of the key-value cache has one beside it."""
    return f"{module}.weight" in specs or module.endswith("_bmm_quantizer")


def _layer_of(member: str) -> tuple[str, ...]:
    """What groups of the same kind share: their path without numbers, and the kind."""
    kind = group_of(member).primary.rpartition(".")[2]
    return kind_of(module_of(member)), kind
