"""Mends of scales that a fused group shares: stored upside down, lost, or one for each member.

Codes stay. Which scale a group gets, and what becomes of the E4M3 numbers under it, is in `kernels.common_scale`.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.kernels import common_scale
from amaxbridge.export.kernels.common_scale import Member, Moved
from amaxbridge.export.repair.edits import Change, Edits, Found, Given, Mapped, Refusal
from amaxbridge.export.repair.mend import Mend, Unseen
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.export.schemes import Scheme
from amaxbridge.export.verify.checkpoint_view import Module
from amaxbridge.mappings.fused_groups import FusedGroup, groups_among

_LARGEST_FP16 = 65504.0
_ZEROS, _ONE = [0x00, 0x80], 0x38  # bytes of E4M3
_ULPS = 4  # of fp32, that a reciprocal of a reciprocal may be off


def groups_of_one_scheme(view: MendedView) -> Iterator[tuple[FusedGroup, Scheme, SharedScale]]:
    """The fused groups, of one member or several, that are quantized in one scheme whose members share a scale."""
    for group in groups_among(module.name for module in view.quantized):
        schemes = {id(scheme): scheme for name in group.members if (scheme := view.modules[name].scheme) is not None}
        if len(schemes) == 1:
            scheme = next(iter(schemes.values()))
            if scheme.group_scale is not None and scheme.levels is not None:
                yield group, scheme, scheme.group_scale


def values_of(view: MendedView, group: FusedGroup, tensor: str) -> dict[str, float]:
    """Member → its scale, those that are finite and positive."""
    found = {name: view.numbers.get(f"{name}.{tensor}", math.nan) for name in group.members}
    return {name: value for name, value in found.items() if 0 < value < math.inf}


def number(view: MendedView, module: Module, scale: SharedScale, value: float) -> Edits:
    """A scale of one fp32 number, in the file of the module's codes if it is new."""
    name = f"{module.name}.{scale.tensor}"
    file = view.file_of([name, *(f"{module.name}.{each}" for each in ("weight_packed", "weight", *module.tensors))])
    return Edits(tensors={name: Given.of(file, torch.tensor(value, dtype=torch.float32).reshape(scale.shape))})


def _inverted(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Divisors below 1 whose reciprocal is the partners' divisor, or says an amax that weights have."""
    for group, scheme, scale in groups_of_one_scheme(view):
        if not scale.is_divisor:
            continue
        values = values_of(view, group, scale.tensor)
        upside_down = {name: value for name, value in values.items() if value < 1}
        right = {value for value in values.values() if value >= 1}
        for name, value in upside_down.items():
            inverse = float(np.float32(1) / np.float32(value))
            partner = next((each for each in right if _is_near(inverse, each)), None)
            if partner is None and not _is_provable(view, group, scheme, scale, value, upside_down, values):
                yield Refusal(
                    f"{name}.{scale.tensor}",
                    f"{value:.6g} says that weights reach {scale.implied(value):.3g}, and its reciprocal "
                    f"{scale.implied(inverse):.3g}: neither the partners nor the block scales tell which is right",
                )
                continue
            becomes = inverse if partner is None else partner
            why = "as its partners have it" if partner is not None else "the block scales fill their range"
            yield Change(
                f"{name}.{scale.tensor}",
                f"{value:.6g} → {becomes:.6g}: a multiplier, where a divisor belongs ({why})",
                number(view, view.modules[name], scale, becomes),
            )


def _is_provable(
    view: MendedView,
    group: FusedGroup,
    scheme: Scheme,
    scale: SharedScale,
    value: float,
    upside_down: Mapping[str, float],
    values: Mapping[str, float],
) -> bool:
    """True if the whole group is upside down, fills the range of block scales, and says what no 16-bit model holds."""
    fills = _top(view, group.members) == scheme.largest_block_scale
    return len(upside_down) == len(values) and fills and scale.implied(value) > _LARGEST_FP16


def _is_near(one: float, other: float) -> bool:
    return abs(one - other) <= _ULPS * float(np.spacing(np.float32(other)))


def _top(view: MendedView, modules: tuple[str, ...]) -> float:
    """The largest block scale of some modules."""
    return max((view.weight_scales[name].greatest for name in modules if name in view.weight_scales), default=math.nan)


def _lost(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """A member's scale that is missing or unusable, where the writer shared scales and the block scales agree."""
    everything = list(groups_of_one_scheme(view))
    several = [values_of(view, group, scale.tensor) for group, _, scale in everything if len(group.members) > 1]
    shares = any(len(values) > 1 for values in several) and all(
        len(set(values.values())) == 1 for values in several if values
    )
    for group, scheme, scale in everything:
        values = values_of(view, group, scale.tensor)
        for name in group.members:
            if name in values:
                continue
            tensor = f"{name}.{scale.tensor}"
            found = "is not there" if tensor not in view.tensors else f"is {view.numbers.get(tensor, math.nan):g}"
            if len(group.members) == 1 or not values:
                yield Refusal(tensor, f"{found}, and no other tensor says the scale of this weight")
            elif not shares:
                yield Refusal(tensor, f"{found}, and fused groups of this checkpoint have scales of their own")
            elif not _tells(view, name, tuple(values), scheme):
                yield Refusal(tensor, f"{found}; its block scales would fit a scale of its own, too")
            else:
                value = next(iter(values.values()))
                yield Change(
                    tensor,
                    f"{found} → {value:.6g}, of {', '.join(each.rpartition('.')[2] for each in values)}: all fused "
                    "groups share their scales here",
                    number(view, view.modules[name], scale, value),
                )


def _tells(view: MendedView, module: str, partners: tuple[str, ...], scheme: Scheme) -> bool:
    """True if block scales rule out that the module had a scale of its own: then its largest would fill the range.

    Under a shared scale the range is filled by one member, so it is the module's own range or its partners' that is
    not. Formats without block scales have nothing to tell.
    """
    limit = scheme.largest_block_scale
    return limit is not None and (_top(view, (module,)) < limit or _top(view, partners) < limit)


def _zeros(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Block scales of zero above codes that are all zero: any other scale says the same weights."""
    for module in view.quantized:
        scheme, extent = module.scheme, view.weight_scales.get(module.name)
        if extent is None or extent.least != 0 or scheme is None or scheme.levels != "weight_scale":
            continue
        name, energies = f"{module.name}.{scheme.levels}", scheme.energies(module.tensors)
        if energies[_ZEROS].any():
            yield Refusal(name, "is zero above codes that are not: the scales of these blocks are lost")
            continue
        table = torch.arange(256, dtype=torch.uint8)
        table[_ZEROS] = _ONE
        edits = Edits(tensors={name: Mapped.of(module.tensors[scheme.levels], table)})
        yield Change(name, "scales of 0 → 1 where all codes of the block are 0: the weights stay", edits)


def _unequal(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    for group, scheme, scale in groups_of_one_scheme(view):
        values = values_of(view, group, scale.tensor)
        if len(values) < len(group.members) or len(set(values.values())) == 1:
            continue
        members = {name: _member(view, name, scheme, scale, value) for name, value in values.items()}
        broken = [name for name, member in members.items() if member is None]
        if broken:
            yield Refusal(
                f"{broken[0]}.{scheme.levels}", "has NaN or negative scales, so nothing can be moved to one scale"
            )
            continue
        whole = {name: member for name, member in members.items() if member is not None}
        least = _least(scheme)
        unit = common_scale.common_unit(list(whole.values()), is_divisor=scale.is_divisor, least=least)
        stored = float(np.float32(1 / unit if scale.is_divisor else unit))
        for name, member in whole.items():
            moved = common_scale.moved(member, unit, least)
            if values[name] != stored or not moved.is_same:
                yield _change(view, view.modules[name], scheme, scale, (values[name], stored), moved)


def _least(scheme: Scheme) -> int:
    """The byte of the least level that may be written: scales of blocks must not vanish, codes may."""
    return 0 if scheme.levels == scheme.codes else 1


def _member(view: MendedView, name: str, scheme: Scheme, scale: SharedScale, value: float) -> Member | None:
    """A member of a group, its weights read once; None if a level is NaN, or a negative scale."""
    bytes_of = scheme.energies(view.modules[name].tensors)
    energy = common_scale.unsigned(bytes_of)
    if energy is None or (_least(scheme) and bool(bytes_of[0x80:].any())):
        return None
    return Member(1 / value if scale.is_divisor else value, energy)


def _change(
    view: MendedView, module: Module, scheme: Scheme, scale: SharedScale, values: tuple[float, float], moved: Moved
) -> Change:
    before, after = values
    edits = number(view, module, scale, after)
    said = f"{before:.9g} → {after:.9g}, one for the group"
    if not moved.is_same and scheme.levels is not None:
        mapped = Mapped.of(module.tensors[scheme.levels], moved.table)
        edits = edits.then(Edits(tensors={f"{module.name}.{scheme.levels}": mapped}))
        said += f"; {scheme.levels} moved"
    if moved.is_exact:
        said += ", weights stay"
    else:
        said += f", weights change by {moved.rms:.2%} (RMS), at most {moved.largest:.2%}"
    return Change(f"{module.name}.{scale.tensor}", said, edits, moved)


MENDS = (
    Mend(
        "inverted-weight-scales",
        ("weight-divisors",),
        "NVFP4's weight_global_scale is stored as the multiplier that it divides by",
        "its reciprocal is written, if a partner has it, or if the group's block scales fill their range and the "
        "stored one says weights beyond 65504; otherwise refused",
        _inverted,
    ),
    Mend(
        "lost-weight-scales",
        ("suffixes", "usable-weight-scales"),
        "the scale that a member of a fused group shares is missing, zero, negative or not finite",
        "it gets its partners' scale, if all fused groups of the checkpoint share theirs and the block scales rule out "
        "one of its own; otherwise refused",
        _lost,
    ),
    Mend(
        "zero-block-scales",
        ("usable-weight-scales",),
        "block scales are zero, which engines take for a fault or divide by",
        "they become 1 where all codes of the block are zero; refused where codes are not",
        _zeros,
    ),
    Mend(
        "one-weight-scale",
        ("fused-weight-scales",),
        "members of a fused group have different global scales, and engines use one of them for all",
        "one global scale for the group, the one with the least squared error of all its weights; codes stay, block "
        "scales move to the nearest (static FP8: codes move, as vLLM moves them when it loads). The change of each "
        "weight is measured and reported",
        _unequal,
    ),
)
