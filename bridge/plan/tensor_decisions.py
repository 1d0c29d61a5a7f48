"""Decides what is made of every tensor of a plan, and warns of what users must know."""

import logging
from collections.abc import Iterable, Sequence

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.casting import Casting
from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.bridge.plan.input_multipliers import linears_before, module_before, norms_with_linears
from amaxbridge.bridge.plan.whole_blocks import ShardedWeight, check_quantizers_blocks
from amaxbridge.export.amax.fused_group_amax import MissingAmax, MixedGroups
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.architectures.facts import GUESS, architecture_of
from amaxbridge.export.output.finalizer import ChangedWeights, Finalizer, FoldedVectors
from amaxbridge.export.schemes import SCHEMES, Groups, Recipe
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.names import is_quantizer_state
from amaxbridge.mappings.tensors import TensorSpec
from amaxbridge.mappings.weights import QKVMapping

_log = logging.getLogger("amaxbridge")


def specs_of(plan: Iterable[BundlePlan]) -> dict[str, TensorSpec]:
    """Every Hugging Face tensor of a plan, quantizer state included."""
    return {name: spec for bundle in plan for name, spec in bundle.specs.items()}


def folded_vectors(hf: HFModel, plan: Iterable[BundlePlan]) -> FoldedVectors:
    """The places for vectors of input quantizers: norms and linears that make their inputs."""
    norms, rows = dict[str, tuple[str, ...]](), dict[str, str]()
    for bundle in plan:
        parts = {part.name: part for part in bundle.parts}
        mappings = {name: part.mapping for name, part in parts.items()}
        for norm, vector in norms_with_linears(parts.keys()).items():
            norms |= dict.fromkeys(parts[norm].tensors, tuple(parts[vector].tensors))
        for vector, weight in linears_before(mappings).items():
            if isinstance(mappings[weight], QKVMapping) or hf.family.up_is_a_factor:
                rows |= dict.fromkeys(parts[vector].tensors, module_before(mappings[weight]))
    return FoldedVectors(norms, rows, bool(hf.family.weight_settings(hf.config).get("layernorm_zero_centered_gamma")))


def decide(
    hf: HFModel,
    plan: Sequence[BundlePlan],
    casting: Casting,
    recipe: Recipe | None,
    state: QuantState,
    missing: MissingAmax,
    mixed: MixedGroups,
    *,
    warn: bool,
    changed: ChangedWeights | None = None,
) -> Finalizer:
    """Decides what is made of every tensor of a plan; warns of amax that differ between ranks or had to be filled.

    A model without quantizers is quantized without data, from its weights alone: the tensors are bit for bit those that
    `model_free_ptq` makes from its plain export.

    Raises:
        UsageError: the recipe needs calibration, but the model has no quantizers.
        MappingError: Megatron's shards cut blocks of quantizers; all of them are named.
    """
    specs = casting.specs(specs_of(plan))
    data_free = recipe is not None and _has_no_quantizers(state, specs)
    if recipe is not None and data_free:
        _check_needs_no_data(recipe)
    vectors = folded_vectors(hf, plan)
    known, calibrated = architecture_of(hf.config) or GUESS, None if data_free else state
    finalizer = Finalizer(
        specs,
        recipe,
        calibrated,
        missing=missing,
        vectors=vectors,
        knowledge=known,
        mixed=mixed,
        changed=changed or ChangedWeights(),
    )
    if calibrated is not None:
        parts = ((part, bundle.ranks_of(part)) for bundle in plan for part in bundle.parts)
        sharded = (ShardedWeight(part.mapping, part.shard.shape, ranks) for part, ranks in parts)
        check_quantizers_blocks(sharded, finalizer.written, hf.model_config)
    if warn:
        casting.announce()
        _warn(state, finalizer)
    if warn and recipe is not None and data_free:
        _log.info("the model has no quantizers: scheme=%s quantizes the weights alone, without data", recipe.name)
    return finalizer


def _has_no_quantizers(state: QuantState, specs: Iterable[str]) -> bool:
    """True if the model has no quantizer state at all."""
    return not (state.formats or state.amax or state.missing or any(map(is_quantizer_state, specs)))


def _check_needs_no_data(recipe: Recipe) -> None:
    schemes = [group.scheme for group in recipe.groups] if isinstance(recipe, Groups) else []
    if schemes and not any(scheme.needs_input_amax for scheme in schemes):
        return
    free = ", ".join(name for name, scheme in SCHEMES.items() if not scheme.needs_input_amax)
    raise UsageError(
        f"scheme={recipe.name} needs quantizers, and the model has none enabled. For what training calibrated, insert "
        "them with ModelOpt, calibrate, and export again. Without calibration, choose a scheme that the weights alone "
        f"decide: {free}; or scheme=none for plain weights"
    )


def _warn(state: QuantState, finalizer: Finalizer) -> None:
    if state.divergent:
        rows = [f"{name}: {values}" for name, values in state.divergent.items()]
        _log.warning("%d amax differ between ranks; the maximum is used:%s", len(rows), listing(rows))
    if finalizer.filled:
        rows = [f"{name}: from {source}" for name, source in finalizer.filled.items()]
        _log.warning("%d amax were missing or unusable and are filled:%s", len(rows), listing(rows))
    if finalizer.unified:
        _log.warning(
            "%d modules of fused groups with several formats are written in 16 bits:%s",
            len(finalizer.unified),
            listing(finalizer.unified),
        )
