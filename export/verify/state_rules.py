"""Rules with a file of quantizer state as reference: every scale is the one that training's amax gives."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule
from amaxbridge.mappings.amax import GLOBAL_AMAX, INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.fused_groups import group_of

_TOLERANCE = 1e-6
_RANGES = {"weight_global_scale": 2688.0, "input_global_scale": 2688.0, "weight_scale": 448.0, "input_scale": 448.0}


def state_rules(file: Path) -> tuple[Rule, ...]:
    """The rules for the amax in a safetensors file, `….q_proj.weight_quantizer._amax` and so on."""
    amax = dict(_amax_in(file))

    def differing(view: CheckpointView) -> Iterator[Problem]:
        for module in view.quantized:
            for suffix, quantizers in (
                (module.group_scale, (GLOBAL_AMAX, WEIGHT_QUANTIZER)),
                (module.input_scale, (INPUT_QUANTIZER,)),
            ):
                value = view.numbers.get(f"{module.name}.{suffix}")
                wanted = _largest(module.name, quantizers, amax.get)
                if suffix is None or value is None or wanted is None or not value > 0:
                    continue
                said = _RANGES[suffix] / value if "global" in suffix else _RANGES[suffix] * value
                if not math.isclose(said, wanted, rel_tol=_TOLERANCE):
                    yield Problem(f"{module.name}.{suffix}", f"is of an amax of {said:.9g}; training has {wanted:.9g}")

    return (
        Rule(
            "amax",
            "scales are those of the amax that training calibrated, the largest of each fused group",
            "serves, and computes something else than training did",
            "Export again with this state",
            differing,
        ),
    )


def _amax_in(file: Path) -> Iterator[tuple[str, float]]:
    with SafetensorsFile(file) as opened:
        for name, stored in opened.tensors.items():
            if stored.spec.nbytes and stored.spec.dtype.is_floating_point and "_amax" in name:
                yield name, float(stored.read().float().max())


def _largest(module: str, quantizers: tuple[str, ...], amax: Callable[[str], float | None]) -> float | None:
    """Of all members of the module's fused group; of each, the first of the quantizer buffers that it has."""
    found = []
    for member in group_of(module).members:
        values = [value for quantizer in quantizers if (value := amax(member + quantizer)) is not None]
        found += values[:1]
    return max(found) if found else None
