"""The Triton kernels give the bytes of plain torch: in Triton's interpreter here, on the hardware in `tests/gpu`."""

import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from tests.support.paths import ROOT, WORKERS

pytest.importorskip("triton")

BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between E2M1 values


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton chooses when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = WORKERS / "interpret_triton.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bits", [8, 11])
def test_a_reciprocal_in_two_parts_falls_on_the_side_of_a_bound_where_the_quotient_does(bits: int) -> None:
    """What `e2m1_triton` does instead of dividing, in exact numbers, on bf16 and fp16 next to every bound."""
    generator = torch.Generator().manual_seed(bits)
    steps = [1.0, 1.5, 1 + 2**-23, 2 - 2**-23, 1.5 - 2**-23, *(1 + torch.rand(400, generator=generator)).tolist()]
    for step in steps:
        high = single(1 / Fraction(step))
        error = single(1 - high * Fraction(step))
        low = single(high * single(error * error + error))
        for bound in BOUNDS:
            unit = Fraction(2) ** (exponent_of(bound * step) - bits + 1)
            for value in (Fraction(bound) * Fraction(step) // unit * unit + count * unit for count in (-1, 0, 1, 2)):
                exact = single(value / Fraction(step))
                found = single(value * high + single(value * low))
                assert (exact > bound, exact >= bound) == (found > bound, found >= bound), (step, bound, value)


def single(value: Fraction) -> Fraction:
    """The nearest fp32, ties to even."""
    if not value:
        return value
    unit = Fraction(2) ** (exponent_of(value) - 23)
    return round(value / unit) * unit


def exponent_of(value: Fraction | float) -> int:
    """The binary logarithm, rounded down."""
    value = abs(Fraction(value))
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1
