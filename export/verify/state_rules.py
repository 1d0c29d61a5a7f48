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


def state_rules(file: Path) -> tuple[Rule, ...]:
    """The rules for the amax in a safetensors file, `….q_proj.weight_quantizer._amax` and so on."""
    amax = dict(_amax_in(file))

    def differing(view: CheckpointView) -> Iterator[Problem]:
        for module in view.quantized:
            for scale, quantizers in (
                (module.group_scale, (GLOBAL_AMAX, WEIGHT_QUANTIZER)),
                (module.input_scale, (INPUT_QUANTIZER,)),
            ):
                name = f"{module.name}.{scale.tensor}" if scale else ""
                value, wanted = view.numbers.get(name), _largest(module.name, quantizers, amax.get)
                if scale is None or value is None or wanted is None or not value > 0:
                    continue
                said = scale.implied(value)
                if not math.isclose(said, wanted, rel_tol=_TOLERANCE):
                    yield Problem(name, f"is of an amax of {said:.9g}; training has {wanted:.9g}")

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
