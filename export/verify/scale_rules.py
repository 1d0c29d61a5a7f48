"""Rules about the values of scales. They read scales, never weights.

How a reciprocal is recognized without a reference: an engine divides by NVFP4's global scale g = 2688 / amax, so g
claims that the largest value of the fused group is 2688 / g. Trained weights stay far below 2688, so g is above 1, and
its reciprocal, amax / 2688, is below 1. This one bound separates the two for every amax below 2688. Block scales alone
cannot tell: they are right in both cases. FP8 and integers multiply by amax / bound, so there it is the other way
around: if all scales of a weight are above 1, its amax would be above 448 (FP8), 127 or 7 in every row or group.

Inputs can be large, so a single input scale on the wrong side proves little. It is an error if half of all input scales
of a model are there, or if one implies an amax that 16-bit floats cannot hold.
"""

import math
from collections.abc import Iterator
from statistics import median

import torch

from amaxbridge.export.kernels.nvfp4 import FP4_MAX, FP8_MAX
from amaxbridge.export.schemes.mx import MX
from amaxbridge.export.schemes.nvfp4 import NVFP4
from amaxbridge.export.schemes.scaled import Scaled
from amaxbridge.export.verify.checkpoint_view import INPUT_SUFFIXES, CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.export.verify.name_rules import is_expert
from amaxbridge.mappings.fused_groups import groups_among

_NVFP4_RANGE = FP4_MAX * FP8_MAX
_LARGEST_FP16 = 65504.0
_E8M0_NAN = 255
_WIDE = 64.0  # times that a group's amax may exceed its largest block: 6 of the 17 binary digits of E4M3's range
_FAR = 1000.0  # times that the input amax of an expert may exceed the median of its layer


def _weight_scales(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        extent = view.weight_scales.get(module.name)
        if extent is None:
            continue
        least, greatest = extent
        if isinstance(module.scheme, MX):
            if greatest >= _E8M0_NAN:
                yield Problem(f"{module.name}.weight_scale", "holds the byte 255, NaN in E8M0")
        elif not 0 < least <= greatest < math.inf:
            yield Problem(f"{module.name}.weight_scale", f"is between {least:g} and {greatest:g}")
    yield from _unusable(view, ("weight_global_scale", "k_scale", "v_scale"))


def _input_scales(view: CheckpointView) -> Iterator[Problem]:
    yield from (problem for problem in _unusable(view, INPUT_SUFFIXES) if not is_expert(problem.subject))


def _expert_input_scales(view: CheckpointView) -> Iterator[Problem]:
    yield from (problem for problem in _unusable(view, INPUT_SUFFIXES) if is_expert(problem.subject))


def _unusable(view: CheckpointView, suffixes: tuple[str, ...]) -> Iterator[Problem]:
    for name, value in view.numbers.items():
        if name.endswith(tuple(f".{suffix}" for suffix in suffixes)) and not 0 < value < math.inf:
            yield Problem(name, f"is {value:g}")


def _reciprocal_weights(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        extent = view.weight_scales.get(module.name)
        if isinstance(module.scheme, NVFP4):
            name = f"{module.name}.weight_global_scale"
            value = view.numbers.get(name, math.nan)
            if 0 < value < 1:
                yield Problem(name, f"{value:g} says that weights reach {_NVFP4_RANGE / value:.3g}")
        elif isinstance(module.scheme, Scaled) and extent is not None and 1 < extent.least < math.inf:
            amax = module.scheme.code.bound * extent.least
            yield Problem(f"{module.name}.weight_scale", f"says that every block of weights reaches {amax:.3g}")


def _reciprocal_inputs(view: CheckpointView) -> Iterator[Problem]:
    for suffix, whole_range in (("input_global_scale", _NVFP4_RANGE), ("input_scale", FP8_MAX)):
        amax = _implied(view, suffix, whole_range)
        limit = _LARGEST_FP16 if not amax or median(amax.values()) <= whole_range else whole_range
        for name, value in amax.items():
            if value > limit:
                yield Problem(name, f"says that inputs reach {value:.3g}")


def _far_experts(view: CheckpointView) -> Iterator[Problem]:
    """Engines use one input scale for all experts of a layer."""
    for suffix, whole_range in (("input_global_scale", _NVFP4_RANGE), ("input_scale", FP8_MAX)):
        layers: dict[tuple[str, str], dict[str, float]] = {}
        for name, value in _implied(view, suffix, whole_range).items():
            if is_expert(name):
                before, _, after = name.partition(".experts.")
                layers.setdefault((before, after.partition(".")[2]), {})[name] = value
        for values in layers.values():
            usual = median(values.values())
            for name, value in values.items():
                if value > _FAR * usual:
                    yield Problem(name, f"says that inputs reach {value:.3g}, half of the other experts {usual:.3g}")


def _implied(view: CheckpointView, suffix: str, whole_range: float) -> dict[str, float]:
    """Name of each usable input scale → the amax that it implies."""
    divides = suffix == "input_global_scale"
    return {
        name: whole_range / value if divides else whole_range * value
        for name, value in view.numbers.items()
        if name.endswith(f".{suffix}") and 0 < value < math.inf
    }


def _unused_range(view: CheckpointView) -> Iterator[Problem]:
    """NVFP4: the largest block scale of a fused group is 448 times (largest weight / amax)."""
    modules = {module.name: module for module in view.quantized if isinstance(module.scheme, NVFP4)}
    for group in groups_among(modules):
        largest = max(view.weight_scales[name].greatest if name in view.weight_scales else 0 for name in group.members)
        if 0 < largest < FP8_MAX / _WIDE:
            name = f"{group.primary}.weight_scale"
            yield Problem(name, f"reaches {largest:g} of 448: the amax is {FP8_MAX / largest:.0f} times the weights'")


def _weight_shapes(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        stored = module.tensors.get("weight_shape")
        if stored is None or stored.spec.dtype != torch.int64 or stored.spec.shape != (2,):
            continue
        found = tuple(stored.read().tolist())
        if module.shape is not None and found != module.shape:
            yield Problem(f"{module.name}.weight_shape", f"says {list(found)}, the codes {list(module.shape)}")


_CALIBRATE = "Find why training has no usable amax there; amax.missing says how to fill it"
_INVERT = "Divide 1 by the scale: a divisor was taken for a factor, or the other way around"

RULES = (
    Rule(
        "usable-weight-scales",
        "scales of weights and of the cache are finite and positive",
        "NaN, Inf or zeros in the layer's output, and from there in every token",
        "Find the weight that holds NaN or Inf, or the quantizer without an amax",
        _weight_scales,
    ),
    Rule(
        "usable-input-scales",
        "input scales are finite and positive",
        "NaN, Inf or zeros in the layer's output, and from there in every token",
        _CALIBRATE,
        _input_scales,
    ),
    Rule(
        "expert-input-scales",
        "input scales of every expert are finite and positive",
        "vLLM combines them over all experts of the layer: one unusable scale spoils every expert",
        _CALIBRATE,
        _expert_input_scales,
    ),
    Rule(
        "far-experts",
        "the input scales of the experts of a layer are of one magnitude",
        "one scale serves all experts of the layer, so one that is far off takes the others' precision",
        "Look at the calibration of this expert: did it see any token?",
        _far_experts,
        Severity.WARNING,
    ),
    Rule(
        "weight-divisors",
        "NVFP4's global scale is a divisor, other formats' scales are factors",
        "loads in silence: weights are off by a factor of millions",
        _INVERT,
        _reciprocal_weights,
    ),
    Rule(
        "input-divisors",
        "NVFP4's input scale is a divisor, FP8's is a factor",
        "loads in silence: all inputs become zero, or saturate",
        _INVERT,
        _reciprocal_inputs,
    ),
    Rule(
        "unused-range",
        "block scales use the range of E4M3",
        "serves, with small weights rounded to zero",
        "The amax is much larger than the weights: was it calibrated on this model?",
        _unused_range,
        Severity.WARNING,
    ),
    Rule(
        "weight-shape",
        "weight_shape is the shape of the codes",
        "the engine cuts or reads the weight in another shape",
        "Export again",
        _weight_shapes,
    ),
)
