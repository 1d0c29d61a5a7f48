"""Mends of static input scales: upside down, left over, lost, of experts that saw no token, one for each member.

Members of a fused group read the same inputs, so one input amax is right for all: the largest that was calibrated. A
larger amax covers more values and rounds small ones coarser; a smaller one would cut values off. Of NVFP4's divisors
the largest amax is the least divisor, of FP8's multipliers the largest.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.repair.edits import Change, Edits, Found, Refusal
from amaxbridge.export.repair.mend import Mend, Unseen
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.export.repair.weight_scale_mends import number
from amaxbridge.export.verify.checkpoint_view import INPUT_SCALES, Module
from amaxbridge.export.verify.name_rules import is_expert
from amaxbridge.mappings.fused_groups import group_of, groups_among

_LARGEST_FP16 = 65504.0


def _scales(view: MendedView) -> Iterator[tuple[Module, SharedScale]]:
    """The modules whose config group has a static input scale."""
    for module in view.quantized:
        if module.scheme is not None and module.scheme.input_scale is not None:
            yield module, module.scheme.input_scale


def _usable(view: MendedView, module: str, scale: SharedScale) -> float | None:
    value = view.numbers.get(f"{module}.{scale.tensor}", math.nan)
    return value if 0 < value < math.inf else None


def _inverted(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """All input scales of the checkpoint, or none: of a single one, nothing tells that it is upside down."""
    values = {
        (module.name, scale): value
        for module, scale in _scales(view)
        if (value := _usable(view, module.name, scale)) is not None
    }
    wrong = {key: value for key, value in values.items() if key[1].implied(value) > _LARGEST_FP16}
    for (name, scale), value in wrong.items():
        tensor, inverse = f"{name}.{scale.tensor}", float(np.float32(1) / np.float32(value))
        partners = [
            other
            for member in group_of(name).members
            if member != name and (other := values.get((member, scale))) is not None
        ]
        if any(abs(other - inverse) <= 4 * float(np.spacing(np.float32(other))) for other in partners):
            becomes, why = min(partners, key=lambda other: abs(other - inverse)), "as its partners have it"
        elif len(wrong) == len(values):
            becomes, why = inverse, f"all {len(values):,} of the checkpoint are upside down"
        else:
            yield Refusal(
                tensor,
                f"{value:.6g} says that inputs reach {scale.implied(value):.3g}; others are in range, so nothing tells "
                "that it is upside down: calibrate this layer again",
            )
            continue
        said = f"{value:.6g} → {becomes:.6g}: the reciprocal of what belongs here ({why})"
        yield Change(tensor, said, number(view, view.modules[name], scale, becomes))


def _left_over(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Input scales of modules whose config group quantizes no inputs, or gives them no static scale."""
    groups: dict[int, list[Module]] = {}
    for module in view.quantized:
        if module.group is not None and view.planned(module):
            groups.setdefault(module.group, []).append(module)
    for number_of, modules in groups.items():
        extra = {module.name: _unplanned(view, module) for module in modules}
        having = {name: tensors for name, tensors in extra.items() if tensors}
        if having and len(having) == len(modules):
            yield Refusal(
                f"config_groups.{view.quantization.groups[number_of].name}",
                f"has no static inputs, and all of its {len(modules):,} modules have an input scale: either may be "
                "wrong. Correct input_activations in config.json, or remove the scales",
            )
            continue
        for tensor in itertools.chain.from_iterable(having.values()):
            dropped = Edits(dropped=frozenset({(view.tensors[tensor].file.path.name, tensor)}))
            yield Change(tensor, "is removed: by config.json, inputs have no static scale", dropped)


def _unplanned(view: MendedView, module: Module) -> list[str]:
    planned = view.planned(module)
    return [f"{module.name}.{each}" for each in INPUT_SCALES if each in module.tensors and each not in planned]


def _lost(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    layers: dict[tuple[str, str], list[float]] = {}
    scales = dict[str, SharedScale]()
    for module, scale in _scales(view):
        scales[module.name] = scale
        if (value := _usable(view, module.name, scale)) is not None and is_expert(module.name):
            layers.setdefault(_of_layer(module.name), []).append(value)
    for group in groups_among(scales):
        values = {name: value for name in group.members if (value := _usable(view, name, scales[name])) is not None}
        for name in group.members:
            if name not in values:
                of_layer = layers.get(_of_layer(name), []) if is_expert(name) else []
                yield _found(view, view.modules[name], scales[name], values, of_layer, unseen)


def _of_layer(module: str) -> tuple[str, str]:
    """The layer and the projection of a routed expert."""
    before, _, after = module.partition(".experts.")
    return before, after.partition(".")[2]


def _found(
    view: MendedView,
    module: Module,
    scale: SharedScale,
    partners: Mapping[str, float],
    of_layer: list[float],
    unseen: Unseen,
) -> Found:
    name = f"{module.name}.{scale.tensor}"
    found = f"is {view.numbers[name]:g}" if name in view.numbers else "is not there"
    if partners:
        value = _of_largest_amax(scale, partners.values())
        others = ", ".join(each.rpartition(".")[2] for each in partners)
        return Change(
            name,
            f"{found} → {value:.6g}, of {others}, which read the same inputs",
            number(view, module, scale, value),
        )
    if not of_layer:
        return Refusal(name, f"{found}, and no other module reads the same inputs: calibrate this layer")
    value = _of_largest_amax(scale, of_layer)
    if unseen is Unseen.ERROR:
        return Refusal(
            name,
            f"{found}: the expert saw no token in calibration. unseen=layer_max gives it {value:.6g}, of the largest "
            "input amax of the layer's experts",
        )
    return Change(
        name,
        f"{found} → {value:.6g}, of the largest input amax of the layer's experts (unseen=layer_max)",
        number(view, module, scale, value),
    )


def _of_largest_amax(scale: SharedScale, values: Iterable[float]) -> float:
    return max(values, key=scale.implied)


def _unequal(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    scales = {module.name: scale for module, scale in _scales(view)}
    for group in groups_among(scales):
        values = {name: value for name in group.members if (value := _usable(view, name, scales[name])) is not None}
        if len(set(values.values())) < 2 or len({scales[name] for name in values}) > 1:
            continue
        becomes = _of_largest_amax(scales[group.primary], values.values())
        for name, value in values.items():
            if value != becomes:
                said = f"{value:.9g} → {becomes:.9g}, of the largest input amax of the group"
                tensor = scales[name].tensor
                yield Change(f"{name}.{tensor}", said, number(view, view.modules[name], scales[name], becomes))


MENDS = (
    Mend(
        "inverted-input-scales",
        ("input-divisors",),
        "NVFP4's input_global_scale is stored as the multiplier that it divides by, or FP8's input_scale as a divisor",
        "its reciprocal is written, if a partner has it, or if every input scale of the checkpoint says inputs beyond "
        "65504; otherwise refused",
        _inverted,
    ),
    Mend(
        "extra-input-scales",
        ("input-scales",),
        "input scales lie beside weights whose inputs have no static scale by config.json",
        "they are removed; refused if all modules of the config group have one, because then config.json may be wrong",
        _left_over,
    ),
    Mend(
        "lost-input-scales",
        ("input-scales", "usable-input-scales", "expert-input-scales"),
        "input scales are missing, zero, negative or not finite",
        "the partners' in the fused group, which read the same inputs; for experts that saw no token, by "
        "unseen=layer_max, the largest input amax of the same projection in the layer; otherwise refused",
        _lost,
    ),
    Mend(
        "one-input-scale",
        ("fused-input-scales",),
        "members of a fused group have different input scales, and engines use one of them for all",
        "all get the scale of the largest input amax",
        _unequal,
    ),
)
