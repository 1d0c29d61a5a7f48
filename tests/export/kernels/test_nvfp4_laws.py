"""NVFP4: laws that hold for every weight, and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.nvfp4 import (
    BLOCK,
    NVFP4Weight,
    dequantize,
    input_global_scale,
    quantize,
    tensor_amax,
)
from tests.support.hard_weights import (
    DTYPES,
    all_arithmetics,
    all_dtypes,
    assert_same_weight,
    random_weight,
    same_bytes,
)

MODELOPT, COMPRESSED_TENSORS = Arithmetic.MODELOPT, Arithmetic.COMPRESSED_TENSORS


@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 6),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    arithmetic=st.sampled_from(Arithmetic),
)
@settings(max_examples=60, deadline=None)
def test_chunks_do_not_show(
    rows: int, blocks: int, chunk: int, seed: int, dtype: torch.dtype, arithmetic: Arithmetic
) -> None:
    weight = random_weight(rows, blocks * BLOCK, seed=seed).to(dtype)
    amax = tensor_amax([weight], arithmetic=arithmetic)
    whole = quantize(weight, amax, arithmetic=arithmetic)
    values = dequantize(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvfp4, "_CPU_CHUNK", chunk)
        assert_same_weight(quantize(weight, amax, arithmetic=arithmetic), whole)
        assert torch.equal(dequantize(whole), values)
    assert whole.packed.shape == (rows, blocks * BLOCK // 2)
    assert whole.block_scale.shape == (rows, blocks)


@given(seed=st.integers(0, 2**31), columns=st.integers(1, 5), arithmetic=st.sampled_from(Arithmetic))
@settings(max_examples=40, deadline=None)
def test_quantizing_rows_and_columns_apart_is_quantizing_the_whole(
    seed: int, columns: int, arithmetic: Arithmetic
) -> None:
    """This law lets ranks and shards quantize on their own, given the group's amax; slices may be strided."""
    weight = random_weight(6, (columns + 1) * BLOCK, seed=seed).bfloat16()
    amax = tensor_amax([weight[:2], weight[2:]], arithmetic=arithmetic)
    assert amax == tensor_amax([weight], arithmetic=arithmetic)
    whole = quantize(weight, amax, arithmetic=arithmetic)
    part = quantize(weight[1::2, BLOCK:], amax, arithmetic=arithmetic)
    assert same_bytes(part.packed, whole.packed[1::2, BLOCK // 2 :])
    assert same_bytes(part.block_scale, whole.block_scale[1::2, 1:])


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), arithmetic=st.sampled_from(Arithmetic))
@settings(max_examples=40, deadline=None)
def test_a_value_moves_by_at_most_half_a_step(seed: int, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
    """The widest step of E2M1 is 2; a block scale is off by at most 1/16."""
    weight = random_weight(8, 64, seed=seed).to(dtype)
    amax = tensor_amax([weight], arithmetic=arithmetic)
    error = dequantize(quantize(weight, amax, arithmetic=arithmetic), torch.float32) - weight.float()
    block_amax = weight.float().abs().unflatten(1, (-1, BLOCK)).amax(-1, keepdim=True)
    assert (error.unflatten(1, (-1, BLOCK)).abs() <= block_amax / 6 * (1 + 1 / 8)).all()


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0)])
@all_arithmetics
def test_an_empty_shard_stays_empty(shape: tuple[int, int], arithmetic: Arithmetic) -> None:
    quantized = quantize(torch.zeros(shape), torch.tensor(1.0), arithmetic=arithmetic)
    assert dequantize(quantized).shape == shape


# Errors


@pytest.mark.parametrize("shape", [(4, 24), (4, 8), (32,), (2, 4, 16)])
def test_a_shape_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        quantize(torch.ones(shape), torch.tensor(1.0), arithmetic=MODELOPT)


@pytest.mark.parametrize("amax", [0.0, -1.0, 1e-39, float("nan"), float("inf")])
def test_an_amax_without_a_scale_is_an_error(amax: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        quantize(torch.ones(1, BLOCK), torch.tensor(amax), arithmetic=MODELOPT)
    with pytest.raises(ValueError, match="positive and finite"):
        input_global_scale(torch.tensor(amax))


@pytest.mark.parametrize("amax", [-1.0, float("inf")])
def test_an_amax_that_breaks_compressed_tensors_is_an_error(amax: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        quantize(torch.ones(1, BLOCK), torch.tensor(amax), arithmetic=COMPRESSED_TENSORS)


@all_arithmetics
def test_amax_has_one_element_of_any_shape(arithmetic: Arithmetic) -> None:
    weight = random_weight()
    expected = quantize(weight, torch.tensor(0.1), arithmetic=arithmetic)
    assert_same_weight(quantize(weight, torch.tensor([0.1]), arithmetic=arithmetic), expected)
    with pytest.raises(ValueError, match=r"one amax .*\(24,\)"):
        quantize(weight, torch.ones(24), arithmetic=arithmetic)


@all_arithmetics
def test_an_unsupported_dtype_is_an_error(arithmetic: Arithmetic) -> None:
    with pytest.raises(ValueError, match="float64"):
        quantize(torch.ones(1, BLOCK, dtype=torch.float64), torch.tensor(1.0), arithmetic=arithmetic)


def test_amax_of_a_group_needs_weights_of_one_dtype() -> None:
    with pytest.raises(ValueError, match="no weights"):
        tensor_amax([], arithmetic=MODELOPT)
    with pytest.raises(ValueError, match=r"\(0, 16\)"):
        tensor_amax([torch.ones(0, 16)], arithmetic=MODELOPT)
    mixed = [torch.ones(1, 16), torch.full((1, 16), 2.0, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"bfloat16, torch\.float32"):
        tensor_amax(mixed, arithmetic=COMPRESSED_TENSORS)
    assert tensor_amax(mixed, arithmetic=MODELOPT) == 2.0


@all_arithmetics
@all_dtypes
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_an_error(arithmetic: Arithmetic, dtype: torch.dtype, value: float) -> None:
    weight = random_weight().to(dtype)
    weight[3, 20] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(weight, torch.tensor(0.1), arithmetic=arithmetic)


def test_a_quantized_weight_checks_its_tensors() -> None:
    good = quantize(random_weight(), torch.tensor(0.1), arithmetic=MODELOPT)
    with pytest.raises(ValueError, match=r"block_scale is torch\.uint8"):
        NVFP4Weight(good.packed, good.block_scale.view(torch.uint8), good.global_scale)
    with pytest.raises(ValueError, match=r"block_scale is .*\(24, 1\)"):
        NVFP4Weight(good.packed, good.block_scale[:, :1], good.global_scale)
    with pytest.raises(ValueError, match=r"global_scale is .* \(\)"):
        NVFP4Weight(good.packed, good.block_scale, good.global_scale[0])
