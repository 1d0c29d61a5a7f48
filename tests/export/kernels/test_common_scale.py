"""One scale for several members: the minimum against a fine grid, and what may never happen to a level."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.common_scale import (
    LEVELS,
    Member,
    common_unit,
    energies_of_blocks,
    energies_of_codes,
    error_of,
    moved,
    unsigned,
)


def a_member(unit: float, seed: int, *, used: int = 40, fills: bool = True) -> Member:
    """Random energies under some levels; the largest level is among them if it fills the range."""
    generator = torch.Generator().manual_seed(seed)
    energy = torch.zeros(127, dtype=torch.float64)
    energy[torch.randint(1, 127, (used,), generator=generator)] = torch.rand(
        used, generator=generator, dtype=torch.float64
    )
    energy[126] = 0.3 if fills else 0.0
    return Member(unit, energy)


units = st.floats(min_value=1e-6, max_value=1e-2)


@settings(max_examples=40, deadline=None)
@given(st.lists(units, min_size=2, max_size=3), st.integers(0, 1000), st.booleans(), st.booleans())
def test_no_unit_of_a_fine_grid_is_better(found: list[float], seed: int, fills: bool, is_divisor: bool) -> None:
    members = [a_member(unit, seed + number, fills=fills) for number, unit in enumerate(found)]
    unit = common_unit(members, is_divisor=is_divisor, least=1)
    least = max(member.largest for member in members) / 448
    best = error_of(members, unit, 1)
    energy = sum(float((each.energy * each.targets**2).sum()) for each in members)
    grid = np.linspace(least, 4 * least, 500)
    assert best <= min(error_of(members, float(each), 1) for each in grid) + 1e-12 * energy
    assert unit >= least * (1 - 1e-6), "no level passes 448"
    stored = np.float32(1 / unit if is_divisor else unit)
    assert unit == (1 / np.float64(stored) if is_divisor else np.float64(stored)), "what is computed is what is stored"


@settings(max_examples=40, deadline=None)
@given(st.lists(units, min_size=1, max_size=3), st.integers(0, 1000))
def test_levels_stay_levels(found: list[float], seed: int) -> None:
    """None vanishes, none is beyond 448, none becomes negative; order stays; zero and NaN stay what they are."""
    members = [a_member(unit, seed + number) for number, unit in enumerate(found)]
    unit = common_unit(members, is_divisor=True, least=1)
    for member in members:
        table = moved(member, unit, 1).table
        after = table[1:127].int()
        assert after.min() >= 1 and after.max() <= 126 and bool((after.diff() >= 0).all())
        assert table[0] == 0 and table[127] == 127 and torch.equal(table[129:255], table[1:127] | 128)


def test_one_member_stays_as_it_is() -> None:
    member = a_member(1 / 5376, 0)
    unit = common_unit([member], is_divisor=True, least=1)
    assert unit == member.unit and moved(member, unit, 1).is_same and moved(member, unit, 1).rms == 0


@pytest.mark.parametrize("times", [2.0, 4.0, 0.5, 8.0])
def test_powers_of_two_cost_nothing(times: float) -> None:
    """All levels are normal after they are halved a few times: the scale of the larger one, and no weight changes."""
    first, second = a_member(1 / 5376, 1), a_member(times / 5376, 2)
    for member in (first, second):
        member.energy[:64] = 0  # below 1: they would become subnormal
    unit = common_unit([first, second], is_divisor=True, least=1)
    assert unit == max(first.unit, second.unit)
    assert [moved(member, unit, 1).is_exact for member in (first, second)] == [True, True]


def test_a_tenth_costs_the_rounding_of_levels() -> None:
    """Three digits of E4M3: at most 6.25 % for one weight where levels are normal, about 2 % in all."""
    first, second = a_member(1 / 5376, 3), a_member(0.1 / 5376, 4)
    second.energy[:40] = 0
    unit = common_unit([first, second], is_divisor=True, least=1)
    changes = [moved(member, unit, 1) for member in (first, second)]
    assert all(change.rms < 0.035 and change.largest <= 0.0626 for change in changes), changes


def test_weights_of_zeros() -> None:
    empty = Member(1e-3, torch.zeros(127, dtype=torch.float64))
    assert common_unit([empty, empty], is_divisor=False) == 1e-3
    assert moved(empty, 1e-3).rms == moved(empty, 1e-3).largest == 0


def test_energies_are_those_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).bfloat16()
    amax = nvfp4.tensor_amax([weight], arithmetic=Arithmetic.MODELOPT)
    quantized = nvfp4.quantize(weight, amax, arithmetic=Arithmetic.MODELOPT)
    divisor = float(nvfp4.global_scale(amax, arithmetic=Arithmetic.MODELOPT, dtype=weight.dtype))
    parts = [quantized.packed[:10], quantized.packed[10:]]
    energy = unsigned(energies_of_blocks(parts, [quantized.block_scale]))
    assert energy is not None
    whole = nvfp4.dequantize(quantized, torch.float32).double().square().sum()
    assert torch.isclose((energy * (LEVELS / divisor) ** 2).sum(), whole, rtol=1e-6)


def test_energies_of_codes() -> None:
    codes = torch.tensor([[1.0, -1.0, 448.0], [0.0, 2.0, -2.0]]).to(torch.float8_e4m3fn)
    energy = unsigned(energies_of_codes([codes[:1], codes[1:]]))
    assert energy is not None and float((energy * LEVELS**2).sum()) == float(codes.double().square().sum())
    nan = torch.tensor([[float("nan")]]).to(torch.float8_e4m3fn)
    assert unsigned(energies_of_codes([nan])) is None
