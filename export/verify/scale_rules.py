"""Rules about the values of scales. They read scales, never weights.

How a reciprocal is recognized without a reference: an engine divides by NVFP4's global scale g = 2688 / amax, so g
claims that the largest value of the fused group is 2688 / g. Trained weights stay far below 2688, so g is above 1, and
its reciprocal, amax / 2688, is below 1. This one bound separates the two for every amax below 2688. Block scales alone
cannot tell: they are right in both cases. FP8 and integers multiply by amax / bound, so there it is the other way
around: if all scales of a weight are above 1, its amax would be above 448 (FP8), 127 or 7 in every row or group.

Inputs can be large, so a single input scale on the wrong side proves little. It is an error if one implies an amax that
16-bit floats cannot hold, or if half of all FP8 or integer input scales of a model are there. NVFP4's are not, because
some recipes calibrate divisors with headroom on purpose: ModelOpt's `nvfp4_act_headroom` multiplies a small input by
16384.
"""

import math
from collections.abc import Iterable, Iterator
from statistics import median

import torch

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.schemes.scheme import fault_of_scales
from amaxbridge.export.verify.checkpoint_view import GLOBAL_SCALES, INPUT_SCALES, CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.export.verify.name_rules import is_expert
from amaxbridge.mappings.fused_groups import groups_among

_LARGEST_FP16 = 65504.0
_WIDE = 64.0  # times that a group's amax may exceed its largest block: 6 of the 17 binary digits of E4M3's range
_FAR = 1000.0  # times that the input amax of an expert may exceed the median of its layer


def _weight_scales(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        extent = view.weight_scales.get(module.name)
        if extent is None:
            continue
        fault = module.scheme.fault_of_scales(*extent) if module.scheme else fault_of_scales(*extent)
        if fault is not None:
            yield Problem(f"{module.name}.weight_scale", fault)
    yield from _unusable(view, (*GLOBAL_SCALES, "k_scale", "v_scale"))


def _input_scales(view: CheckpointView) -> Iterator[Problem]:
    yield from (problem for problem in _unusable(view, INPUT_SCALES) if not is_expert(problem.subject))


def _expert_input_scales(view: CheckpointView) -> Iterator[Problem]:
    yield from (problem for problem in _unusable(view, INPUT_SCALES) if is_expert(problem.subject))


def _unusable(view: CheckpointView, suffixes: Iterable[str]) -> Iterator[Problem]:
    endings = tuple(f".{suffix}" for suffix in suffixes)
    for name, value in view.numbers.items():
        if name.endswith(endings) and not 0 < value < math.inf:
            yield Problem(name, f"is {value:g}")


def _reciprocal_weights(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        extent, scale = view.weight_scales.get(module.name), module.group_scale
        bound = module.scheme.block_bound if module.scheme else None
        if scale is not None and scale.tensor in GLOBAL_SCALES:
            name = f"{module.name}.{scale.tensor}"
            value = view.numbers.get(name, math.nan)
            if 0 < value < math.inf and (value < 1 if scale.is_divisor else value > 1):
                yield Problem(name, f"{value:g} says that weights reach {scale.implied(value):.3g}")
        elif bound is not None and extent is not None and 1 < extent.least < math.inf:
            amax = bound * extent.least
            yield Problem(f"{module.name}.weight_scale", f"says that every block of weights reaches {amax:.3g}")


def _reciprocal_inputs(view: CheckpointView) -> Iterator[Problem]:
    for scale, amax in _implied(view).items():
        many = not scale.is_divisor and median(amax.values()) > scale.span
        limit = scale.span if many else _LARGEST_FP16
        for name, value in amax.items():
            if value > limit:
                yield Problem(name, f"says that inputs reach {value:.3g}")


def _far_experts(view: CheckpointView) -> Iterator[Problem]:
    """Engines use one input scale for all experts of a layer."""
    for amax in _implied(view).values():
        layers: dict[tuple[str, str], dict[str, float]] = {}
        for name, value in amax.items():
            if is_expert(name):
                before, _, after = name.partition(".experts.")
                layers.setdefault((before, after.partition(".")[2]), {})[name] = value
        for values in layers.values():
            usual = median(values.values())
            for name, value in values.items():
                if value > _FAR * usual:
                    yield Problem(name, f"says that inputs reach {value:.3g}, half of the other experts {usual:.3g}")


def _implied(view: CheckpointView) -> dict[SharedScale, dict[str, float]]:
    """Kind of input scale → name of each usable one → the amax that it implies."""
    found: dict[SharedScale, dict[str, float]] = {}
    for module in view.quantized:
        for scale in (module.input_scale,) if module.input_scale is not None else ():
            name = f"{module.name}.{scale.tensor}"
            value = view.numbers.get(name, math.nan)
            if 0 < value < math.inf:
                found.setdefault(scale, {})[name] = scale.implied(value)
    return found


def _unused_range(view: CheckpointView) -> Iterator[Problem]:
    """The largest block scale of a fused group in NVFP4 is 448 times (largest weight / amax)."""
    limits = {each.name: each.scheme and each.scheme.largest_block_scale for each in view.quantized}
    for group in groups_among(name for name, limit in limits.items() if limit is not None):
        largest = max(view.weight_scales[name].greatest if name in view.weight_scales else 0 for name in group.members)
        limit = limits[group.primary] or math.nan
        if 0 < largest < limit / _WIDE:
            name, times = f"{group.primary}.weight_scale", f"{limit / largest:.0f} times"
            yield Problem(name, f"reaches {largest:g} of {limit:g}: the amax is {times} the weights'")


def _weight_shapes(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        stored = module.tensors.get("weight_shape")
        if stored is None or stored.spec.dtype not in (torch.int32, torch.int64) or stored.spec.shape != (2,):
            continue
        found = tuple(stored.read().tolist())
        if module.shape is not None and found != module.shape:
            yield Problem(f"{module.name}.weight_shape", f"says {list(found)}, the codes {list(module.shape)}")


_CALIBRATE = "Find why training has no usable amax there; missing_amax= says how to fill it"
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
        "NVFP4's global scale is a divisor (in ModelOpt's format a factor), other formats' scales are factors",
        "loads in silence: weights are off by a factor of millions",
        _INVERT,
        _reciprocal_weights,
    ),
    Rule(
        "input-divisors",
        "NVFP4's input scale is a divisor (in ModelOpt's format a factor), FP8's is a factor",
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
