"""The compiled loops for bf16 on a CPU give the bytes of the plain torch that defines them, on every bf16 there is."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amaxbridge.export.kernels import e2m1, mx, scaled
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Blocks, Code
from tests.support.every_bf16 import Quantize, every_block_amax, every_value, nvfp4_of
from tests.support.hard_weights import WEIGHTS, all_arithmetics, random_weight, same_bytes, weights_of_all_kinds

BLOCKS = (Blocks(), Blocks(None, None), Blocks(width=48), Blocks(7, 40), Blocks(128, 128))


def assert_loops_agree(quantize: Quantize, weight: Tensor) -> None:
    found = quantize(weight)
    with pytest.MonkeyPatch.context() as patch:
        for module in (e2m1, scaled):
            patch.setattr(module, "fits_loops", lambda weight: False)
        expected = quantize(weight)
    assert all(same_bytes(one, other) for one, other in zip(found, expected, strict=True))


@all_arithmetics
@pytest.mark.parametrize("amax", [1e-30, 0.0123, 0.1, 1.0, 147.0, 3e38])
@pytest.mark.parametrize("blocks", [every_block_amax, every_value])
def test_nvfp4_on_every_bf16(blocks: Callable[[int], Tensor], amax: float, arithmetic: Arithmetic) -> None:
    assert_loops_agree(nvfp4_of(arithmetic, amax), blocks(16))


@all_arithmetics
@pytest.mark.parametrize("blocks", [every_block_amax, every_value])
@pytest.mark.parametrize("quantize", [mx.quantize_mxfp4, mx.quantize_mxfp8])
def test_mx_on_every_bf16(
    quantize: Callable[[Tensor, Arithmetic], tuple[Tensor, Tensor]],
    blocks: Callable[[int], Tensor],
    arithmetic: Arithmetic,
) -> None:
    assert_loops_agree(lambda weight: quantize(weight, arithmetic), blocks(32))


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize("calibrated", [False, True])
def test_scaled_codes_on_every_bf16(code: Code, calibrated: bool) -> None:
    for blocks in (every_block_amax(32), every_value(32)):

        def quantize(weight: Tensor) -> tuple[Tensor, ...]:
            amax = torch.full((len(weight), 1), 0.7) if calibrated else None
            found = scaled.quantize(weight, code, Blocks(), amax=amax)
            return found.codes, found.scale

        assert_loops_agree(quantize, blocks)


@weights_of_all_kinds
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_blocks_of_every_shape(blocks: Blocks, symmetric: bool, kind: str) -> None:
    weight = WEIGHTS[kind]().bfloat16()

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        found = scaled.quantize(weight, Code.INT4, blocks, symmetric=symmetric)
        zero_point = () if found.zero_point is None else (found.zero_point,)
        return found.codes, found.scale, *zero_point

    assert_loops_agree(quantize, weight)


@given(rows=st.integers(1, 20), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packed_integers_come_back(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = scaled.pack_int4(codes)
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(scaled.unpack_int4(packed, columns), codes)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), blocks=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_strided_weights(seed: int, rows: int, blocks: int) -> None:
    """Rows of a packed tensor and transposed weights are quantized as their copies are."""
    weight = random_weight(2 * rows, 64 * blocks, seed=seed).bfloat16()
    for part in (weight[1::2, 32 * blocks :], weight.T[: 32 * blocks, : 2 * rows].T):
        for quantize in (nvfp4_of(Arithmetic.MODELOPT, 0.1), lambda w: mx.quantize_mxfp8(w, Arithmetic.MODELOPT)):
            pairs = zip(quantize(part), quantize(part.clone()), strict=True)
            assert all(same_bytes(one, other) for one, other in pairs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_that_is_not_finite_is_an_error(value: float, dtype: torch.dtype) -> None:
    weight = random_weight().to(dtype)
    weight[5, 7] = value
    for arithmetic in Arithmetic:
        for quantize in (mx.quantize_mxfp4, mx.quantize_mxfp8):
            with pytest.raises(ValueError, match="NaN or Inf"):
                quantize(weight, arithmetic)
    for code in Code:
        with pytest.raises(ValueError, match="NaN or Inf"):
            scaled.quantize(weight, code, Blocks())


@pytest.mark.parametrize("amax", [-1.0, float("nan"), float("inf")])
def test_an_amax_that_makes_no_scale_is_an_error(amax: float) -> None:
    with pytest.raises(ValueError, match="calibrated amax"):
        scaled.quantize(random_weight(), Code.E4M3, Blocks(), amax=torch.full((24, 1), amax))
