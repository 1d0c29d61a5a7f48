"""What is made of every tensor of a plan, and what users must know of it."""

import logging
from collections.abc import Iterable, Mapping, Sequence

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.export.amax.fused_group_amax import MissingAmax
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.schemes import Recipe
from amaxbridge.mappings.errors import listing
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec

_log = logging.getLogger("amaxbridge")


def specs_of(plan: Iterable[BundlePlan]) -> dict[str, TensorSpec]:
    """Every Hugging Face tensor of a plan, quantizer state included."""
    return {name: spec for bundle in plan for name, spec in bundle.specs.items()}


def decide(
    hf: HFModel,
    plan: Sequence[BundlePlan],
    recipe: Recipe | None,
    state: QuantState,
    missing: MissingAmax,
    *,
    warn: bool,
) -> Finalizer:
    """What is made of every tensor of a plan, with a warning of amax that differ or had to be filled."""
    finalizer = Finalizer(specs_of(plan), recipe, state, missing=missing)
    finalizer.ignore += map(module_of, hf.tied_head)  # a Linear to every consumer, though it has no tensor of its own
    if warn:
        _warn(state, finalizer.filled)
    return finalizer


def _warn(state: QuantState, filled: Mapping[str, str]) -> None:
    if state.divergent:
        rows = [f"{name}: {values}" for name, values in state.divergent.items()]
        _log.warning("%d amax differ between ranks; the maximum is used:%s", len(rows), listing(rows))
    if filled:
        rows = [f"{name}: from {source}" for name, source in filled.items()]
        _log.warning("%d amax were missing or unusable and are filled:%s", len(rows), listing(rows))
