"""One amax for each fused group: the maximum of its members, and what each policy may fill in."""

import math

import pytest
import torch

from amaxbridge.export.amax.fused_group_amax import MissingAmax, share_amax
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import AmaxError

MLP = "model.layers.0.mlp"
GATE, UP, DOWN = (f"{MLP}.{part}_proj" for part in ("gate", "up", "down"))
MODULES = (GATE, UP, DOWN)
UNUSABLE = {"missing": None, "zero": 0.0, "negative": -1.0, "NaN": math.nan, "infinite": math.inf}


def state_without(quantizer: str, value: float | None) -> QuantState:
    """A calibrated state in which one quantizer has an amax that makes no scale, or none."""
    amax = {f"{module}{kind}": torch.tensor(2.0) for module in MODULES for kind in (WEIGHT_QUANTIZER, INPUT_QUANTIZER)}
    del amax[quantizer]
    return QuantState(amax if value is None else {**amax, quantizer: torch.tensor(value)})


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_from_weights_fills_no_input_amax(kind: str, module: str) -> None:
    """Only data shows how large inputs get; weights say nothing about it."""
    quantizer = module + INPUT_QUANTIZER
    with pytest.raises(AmaxError) as refused:
        share_amax(state_without(quantizer, UNUSABLE[kind]), MODULES, MODULES, missing=MissingAmax.FROM_WEIGHTS)
    assert f"1 amax are missing, zero, negative or not finite:\n  {quantizer}: " in str(refused.value)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_from_weights_fills_a_weight_amax(kind: str, module: str) -> None:
    """The whole group takes its weight amax from the weights, and keeps its calibrated input amax."""
    quantizer = module + WEIGHT_QUANTIZER
    shared = share_amax(state_without(quantizer, UNUSABLE[kind]), MODULES, MODULES, missing=MissingAmax.FROM_WEIGHTS)
    assert shared.filled == {quantizer: "the weights"}
    assert shared.by_module.keys() == set(MODULES)
    for each, amax in shared.by_module.items():
        assert (amax.weight is None) == (each == module or {each, module} == {GATE, UP})
        assert amax.input is not None and amax.input.item() == 2.0


@pytest.mark.parametrize("suffix", [WEIGHT_QUANTIZER, INPUT_QUANTIZER])
def test_group_max_fills_from_the_same_group_alone(suffix: str) -> None:
    shared = share_amax(state_without(UP + suffix, None), MODULES, MODULES, missing=MissingAmax.GROUP_MAX)
    assert shared.filled == {UP + suffix: "the largest of its fused group"}
    with pytest.raises(AmaxError, match="down_proj"):
        share_amax(state_without(DOWN + suffix, None), MODULES, MODULES, missing=MissingAmax.GROUP_MAX)


@pytest.mark.parametrize("suffix", [WEIGHT_QUANTIZER, INPUT_QUANTIZER])
def test_nothing_is_filled_by_default(suffix: str) -> None:
    with pytest.raises(AmaxError, match="up_proj"):
        share_amax(state_without(UP + suffix, None), MODULES, MODULES)
