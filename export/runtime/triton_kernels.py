"""Matrix products on a GPU: packed 4-bit weights, dequantized on the fly, and 8-bit integers.

Imported only where a tensor is on a GPU. They show that a loaded layer computes; engines have faster kernels. Both
accumulate what the CPU computes, in fp32 and int32; tests compare them with the CPU, in Triton's interpreter, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 64  # the width of a tile of Marlin


def int4_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    *,
    group_size: int,
    has_single_scale: bool,
    zero_points: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T` with a weight in Marlin's layout, dequantized in fp32 and rounded to the dtype of `x`.

    Args:
        x: `[tokens, in]`, inputs sorted by group under act-order.
        packed: int32 `[in / 16, out * 2]`, of `marlin_repack`.
        scale: fp32 `[groups, out]`, of `marlin_permute_scales`.
        group_size: inputs that share a scale; -1 for all.
        has_single_scale: whether the scales stand in the order for one group.
        zero_points: int8 `[out, groups]`, less 8 as codes are.
        groups: int32 `[in]`, the group of each input under act-order.

    Returns:
        `[tokens, out]` in the dtype of `x`.
    """
    x = x.contiguous()
    tokens, size_k = x.shape
    size_n = packed.shape[1] // 2
    out = torch.empty(tokens, size_n, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    block_m = min(64, max(16, triton.next_power_of_2(tokens)))
    _int4_kernel[(triton.cdiv(tokens, block_m), size_n // _BLOCK_N)](
        x, packed, scale, zero_points, groups, out, tokens, size_k, size_n,
        size_k if group_size == -1 else group_size, scale.shape[0],
        HAS_SINGLE_SCALE=has_single_scale, HAS_ZERO_POINTS=zero_points is not None, HAS_GROUPS=groups is not None,
        BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_K=64,
    )  # fmt: skip
    return out


def int8_matmul(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(x @ weight) * x_scale * weight_scale`, the product exact in int32.

    Args:
        x: int8 `[tokens, in]`.
        weight: int8 `[in, out]`, of any strides.
        x_scale: fp32 `[tokens, 1]`.
        weight_scale: fp32 `[out]`.
        dtype: of the result `[tokens, out]`.
    """
    x = x.contiguous()
    (tokens, size_k), size_n = x.shape, weight.shape[1]
    out = torch.empty(tokens, size_n, dtype=dtype, device=x.device)
    if tokens == 0:
        return out
    block_m = min(64, max(16, triton.next_power_of_2(tokens)))
    _int8_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(size_n, _BLOCK_N))](
        x, weight, x_scale, weight_scale, out, tokens, size_k, size_n, weight.stride(0), weight.stride(1),
        BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_K=64,
    )  # fmt: skip
    return out


@triton.jit
def _int4_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, groups_ptr, out_ptr, tokens, size_k, size_n, group_size, group_count,
    HAS_SINGLE_SCALE: tl.constexpr, HAS_ZERO_POINTS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Where output n stands in a row of tiles, and in a permuted row of scales: `marlin.py` has the tables.
    column = n % 64
    word_of_n = (n // 64) * 128 + (column % 8) * 16 + column // 16
    if HAS_SINGLE_SCALE:
        scale_of_n = (n // 32) * 32 + (n % 8) // 2 * 8 + (n % 32) // 8 * 2 + n % 2
    else:
        scale_of_n = (n // 64) * 64 + (n % 8) * 8 + column // 8
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, size_k, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = k % 16
        word = (k // 16 * size_n * 2 + row % 8 // 2 * 4)[:, None] + word_of_n[None, :]
        index = (row % 2 + row // 8 * 2)[:, None] + (column % 16 // 8 * 4)[None, :]
        place = index // 2 + index % 2 * 4
        weight = ((tl.load(packed_ptr + word) >> (place * 4)) & 15).to(tl.float32) - 8.0
        group = tl.load(groups_ptr + k) if HAS_GROUPS else k // group_size
        if HAS_ZERO_POINTS:
            weight -= tl.load(zero_ptr + n[None, :] * group_count + group[:, None]).to(tl.float32)
        weight *= tl.load(scale_ptr + group[:, None] * size_n + scale_of_n[None, :])
        x = tl.load(x_ptr + m[:, None] * size_k + k[None, :], mask=m[:, None] < tokens, other=0.0)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * size_n + n[None, :], out, mask=m[:, None] < tokens)


@triton.jit
def _int8_kernel(
    x_ptr, weight_ptr, x_scale_ptr, weight_scale_ptr, out_ptr, tokens, size_k, size_n, stride_k, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, size_k, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < size_k
        x = tl.load(x_ptr + m[:, None] * size_k + k[None, :], mask=(m[:, None] < tokens) & inside[None, :], other=0)
        weight = tl.load(
            weight_ptr + k[:, None] * stride_k + n[None, :] * stride_n,
            mask=inside[:, None] & (n[None, :] < size_n),
            other=0,
        )
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m, mask=m < tokens, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < size_n, other=0.0)
    out = (total.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * size_n + n[None, :], out, mask=(m[:, None] < tokens) & (n[None, :] < size_n))
