"""One scale for weights that were quantized under several: codes stay, E4M3 numbers under the scale move.

A weight is `code * level * unit`: `level` is an E4M3 number on the disk (of NVFP4 the scale of a block; of FP8 the
weight's own code, and `code` is 1), `unit` the scale of the member (of NVFP4 `1 / weight_global_scale`). A fused group
must have one unit `x`. A level `v` of member `m` becomes `t`, the E4M3 number nearest to `v * unit_m / x`, and the
squared error of the group is

    F(x) = sum over m, v of  energy[m, v] * (v * unit_m - t * x)^2,      energy[m, v] = sum of code^2 under level v

There are 126 positive levels, so F depends on the weights through 126 energies a member, and everything about the
change follows from them: weights are read once, to sum the energies.

`common_unit` minimizes F exactly:

- No level may pass 448: `x >= x_min = max(v * unit_m) / 448`.
- `x < 2 * x_min` is enough: halving a larger x doubles every level that is written, and twice a level is a level, so
  F(x/2) <= F(x). They differ only where the levels under x are subnormal.
- Between two neighbouring points where some nearest level changes (`v * unit_m / x` halfway between two levels), every
  t is fixed and F is a parabola in x. F is continuous. So the minimum lies in the vertex of a parabola, or at an end.

In one octave each of the `126 * members` levels crosses eight or nine such points: a few thousand parabolas, whose
coefficients are running sums. Their best vertices are then compared as the disk stores them, in fp32, with the members'
own units, shifted by powers of two into the octave, which keep that member exact. Equal errors: a member's own unit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1

LEVELS: Tensor = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""Every E4M3 number that is not negative, by its byte: 0 to 448."""

_BYTES = 256
_SIGN = 0x80
_EQUAL = 1e-12  # of the energy of a group, that sums of rounded numbers may differ
_FEW = 16  # parabolas whose vertices are compared as they are stored


@dataclass(frozen=True, slots=True)
class Member:
    """A weight of a fused group.

    Args:
        unit: its scale as a multiplier.
        energy: fp64 `[127]`: by the byte of a level, the sum of the squared codes under it.
    """

    unit: float
    energy: Tensor

    @property
    def targets(self) -> Tensor:
        """What each level stands for, fp64 `[127]`."""
        return LEVELS * self.unit

    @property
    def largest(self) -> float:
        """The largest target that any weight needs; 0 if all weights are zero."""
        return float((self.targets * (self.energy > 0)).max())


@dataclass(frozen=True, slots=True)
class Moved:
    """What becomes of a member under another unit.

    Args:
        table: uint8 `[256]`: byte of a level before → after.
        rms: root mean square of the change of its weights, relative to that of the weights.
        largest: largest change of a weight, relative to the weight itself.
    """

    table: Tensor
    rms: float
    largest: float

    @property
    def is_same(self) -> bool:
        """True if no level changes."""
        return bool((self.table == torch.arange(_BYTES, dtype=torch.uint8)).all())

    @property
    def is_exact(self) -> bool:
        """True if no weight changes but by the rounding of an engine."""
        return self.largest < 1e-6


def energies_of_blocks(packed: Iterable[Tensor], scales: Iterable[Tensor]) -> Tensor:
    """Of an NVFP4 weight: for each byte of a block scale, the sum of squared codes under it, fp64 `[256]`.

    Args:
        packed: uint8 `[out, in/2]` in parts of some rows.
        scales: float8_e4m3fn `[out, in/16]`, in the same parts or others.
    """
    squares = e2m1.unpack(torch.arange(_BYTES, dtype=torch.uint8).reshape(-1, 1)).square().sum(1).numpy()
    sums, first = np.zeros(_BYTES), 0
    levels = np.concatenate([rows.view(torch.uint8).numpy().copy() for rows in scales])
    for rows in packed:
        under = levels[first : first + len(rows)]
        of_blocks = squares[rows.numpy()].reshape(*under.shape, -1).sum(-1)
        sums += np.bincount(under.ravel(), of_blocks.ravel().astype(np.float64), _BYTES)
        first += len(rows)
    return torch.from_numpy(sums)


def energies_of_codes(codes: Iterable[Tensor]) -> Tensor:
    """Of an FP8 weight, float8_e4m3fn `[out, in]` in parts: for each byte, how often it occurs, fp64 `[256]`."""
    sums = np.zeros(_BYTES)
    for rows in codes:
        sums += np.bincount(rows.view(torch.uint8).numpy().ravel(), minlength=_BYTES)
    return torch.from_numpy(sums)


def unsigned(energies: Tensor) -> Tensor | None:
    """Energies by magnitude, `[127]`, from those of all bytes, `[256]`; None if a level is NaN."""
    if energies[0x7F] or energies[0xFF]:
        return None
    return energies[:0x7F] + energies[_SIGN:0xFF]


def common_unit(members: Sequence[Member], *, is_divisor: bool, least: int = 0) -> float:
    """The unit with the least squared error of the group, as fp32 stores it.

    Args:
        is_divisor: True if its reciprocal is stored.
        least: byte of the least level that may be written: 1 if none may become zero.
    """
    needed = max(member.largest for member in members)
    if needed == 0:
        return members[0].unit
    low, high = needed / float(LEVELS[-1]), 2 * needed / float(LEVELS[-1])
    vertices = _vertices(members, low, high, least)
    own = [_into(member.unit, low, high) for member in members]
    kept = [member.unit for member in members if low * (1 - 1e-12) <= member.unit < high]
    units = {_stored(unit, is_divisor=is_divisor): None for unit in [*kept, *own, *vertices]}
    errors = {unit: error_of(members, unit, least) for unit in units}
    total = sum(float((each.energy * each.targets**2).sum()) for each in members)
    enough = min(errors.values()) + _EQUAL * total
    return next(unit for unit, error in errors.items() if error <= enough)  # the first of equals: a member's own


def error_of(members: Iterable[Member], unit: float, least: int = 0) -> float:
    """F of the module's docstring."""
    return sum(
        float((each.energy * (each.targets - _nearest(each, unit, least) * unit) ** 2).sum()) for each in members
    )


def moved(member: Member, unit: float, least: int = 0) -> Moved:
    """A member under another unit: its levels, and what that changes."""
    levels = _nearest(member, unit, least)
    bytes_after = levels.to(torch.float8_e4m3fn).view(torch.uint8)
    table = torch.arange(_BYTES, dtype=torch.uint8)
    table[:0x7F], table[_SIGN:0xFF] = bytes_after, bytes_after | _SIGN
    used = (member.energy > 0) & (LEVELS > 0)
    targets = member.targets[used]
    change = (levels[used] * unit - targets).abs()
    energy = member.energy[used]
    if not len(targets):
        return Moved(table, 0.0, 0.0)
    rms = math.sqrt(float((energy * change**2).sum() / (energy * targets**2).sum()))
    return Moved(table, rms, float((change / targets).max()))


def _nearest(member: Member, unit: float, least: int) -> Tensor:
    """The allowed level nearest to each target under a unit; a tie takes the even byte, as E4M3 rounds."""
    wanted = (member.targets / unit).clamp(0.0, float(LEVELS[-1])).to(torch.float32)
    levels = wanted.to(torch.float8_e4m3fn).double().clamp(min=float(LEVELS[least]))
    return torch.where(LEVELS > 0, levels, LEVELS)  # zero stays: an engine reads zeros there


def _vertices(members: Sequence[Member], low: float, high: float, least: int) -> list[float]:
    """The units in one octave at which the parabolas are lowest, the best ones first."""
    targets = torch.cat([member.targets for member in members])
    energies = torch.cat([member.energy for member in members])
    used = (energies > 0) & (targets > 0)
    targets, energies = targets[used], energies[used]
    halves = (LEVELS[least:-1] + LEVELS[least + 1 :]) / 2
    crossings = targets[:, None] / halves[None, :]  # where a target passes from level k + 1 down to k
    inside = (crossings > low) & (crossings < high)
    which, below = inside.nonzero(as_tuple=True)
    order = crossings[inside].argsort()
    which, below = which[order], below[order] + least
    ends = torch.cat([torch.tensor([low]).double(), crossings[inside][order], torch.tensor([high]).double()])
    started = torch.searchsorted(halves, targets / low) + least
    squares = (energies * LEVELS[started] ** 2).sum()
    products = (energies * targets * LEVELS[started]).sum()
    step = energies[which]
    up, down = LEVELS[below + 1], LEVELS[below]
    squares = squares + torch.cat([torch.zeros(1).double(), (step * (down**2 - up**2)).cumsum(0)])
    products = products + torch.cat([torch.zeros(1).double(), (step * targets[which] * (down - up)).cumsum(0)])
    vertices = (products / squares).nan_to_num(nan=low).clamp(ends[:-1], ends[1:])
    errors = squares * vertices**2 - 2 * products * vertices
    best = errors.argsort()[:_FEW]
    return [float(each) for each in vertices[best]]


def _into(unit: float, low: float, high: float) -> float:
    """The unit times a power of two, in [low, high)."""
    shifted = unit * 2.0 ** math.floor(math.log2(high / unit))
    return shifted / 2 if shifted >= high else shifted


def _stored(unit: float, *, is_divisor: bool) -> float:
    """A unit as fp32 holds it, or its reciprocal."""
    stored = np.float32(1 / unit if is_divisor else unit)
    return float(1 / np.float64(stored)) if is_divisor else float(stored)
