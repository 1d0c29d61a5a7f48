"""Marlin's layout against its definition, written out word by word here."""

import pytest
import torch
from torch import Tensor

from amaxbridge.export.runtime import (
    GPTQ_MARLIN_MIN_THREAD_K,
    GPTQ_MARLIN_MIN_THREAD_N,
    GPTQ_MARLIN_TILE,
    MARLIN_SUPPORTED_GROUP_SIZES,
    SCALAR_TYPE_UINT4,
    SCALAR_TYPE_UINT4B8,
    get_scale_perms,
    marlin_make_empty_g_idx,
    marlin_make_workspace,
    marlin_permute_scales,
    marlin_repack,
    marlin_unpack,
    replace_parameter,
    verify_marlin_supported,
    verify_marlin_supports_shape,
)
from amaxbridge.export.runtime.marlin import marlin_unpermute_scales

SIZE_K, SIZE_N = 128, 192
every_width = pytest.mark.parametrize("bits", [4, 8])
any_order = pytest.mark.parametrize("is_sorted", [False, True], ids=["as it is", "act-order"])


def random_words(bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(2**31), 2**31, (SIZE_K * bits // 32, SIZE_N), dtype=torch.int32, generator=generator)


def order(is_sorted: bool) -> Tensor:
    return torch.randperm(SIZE_K, generator=torch.Generator().manual_seed(1)) if is_sorted else torch.empty(0).int()


def repacked_by_definition(packed: Tensor, perm: Tensor, bits: int) -> Tensor:
    """The words in the order in which the GPU's repacking kernel writes them, thread by thread."""
    per_word = 32 // bits
    words = [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()]
    rows = perm.tolist() or list(range(SIZE_K))

    def code(k: int, n: int) -> int:
        k = rows[k]
        return words[k // per_word][n] >> (k % per_word * bits) & (2**bits - 1)

    tile_words = 16 * 64 // per_word
    out = [[0] * (SIZE_N * 16 // per_word) for _ in range(SIZE_K // 16)]
    for tile_k in range(SIZE_K // 16):
        for tile_n in range(SIZE_N // 64):
            for thread in range(32):
                for warp in range(4):
                    column = tile_n * 64 + warp * 16 + thread // 4
                    first_row = tile_k * 16 + thread % 4 * 2
                    values = [code(first_row + offset, column) for offset in (0, 1, 8, 9)]
                    values += [code(first_row + offset, column + 8) for offset in (0, 1, 8, 9)]
                    if bits == 4:
                        word = sum(values[v] << (4 * i) for i, v in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
                        out[tile_k][tile_n * tile_words + thread * 4 + warp] = word
                    else:
                        for half in range(2):
                            word = sum(values[4 * half + v] << (8 * i) for i, v in enumerate([0, 2, 1, 3]))
                            out[tile_k][tile_n * tile_words + thread * 8 + warp * 2 + half] = word
    return torch.tensor(out).to(torch.int32)


@every_width
@any_order
def test_repack_is_the_definition(bits: int, is_sorted: bool) -> None:
    packed, perm = random_words(bits), order(is_sorted)
    found = marlin_repack(packed, perm, SIZE_K, SIZE_N, bits)
    assert found.dtype == torch.int32 and found.shape == (SIZE_K // GPTQ_MARLIN_TILE, SIZE_N * 16 * bits // 32)
    assert torch.equal(found, repacked_by_definition(packed, perm, bits))


@every_width
@any_order
def test_repack_is_reversible(bits: int, is_sorted: bool) -> None:
    packed, perm = random_words(bits), order(is_sorted)
    there = marlin_repack(packed, perm, SIZE_K, SIZE_N, bits)
    assert torch.equal(marlin_unpack(there, perm, SIZE_K, SIZE_N, bits), packed)
    back = marlin_unpack(packed.reshape(there.shape), perm, SIZE_K, SIZE_N, bits)  # any words are some repacked weight
    assert torch.equal(marlin_repack(back, perm, SIZE_K, SIZE_N, bits), packed.reshape(there.shape))


def test_scales_are_permuted() -> None:
    grouped, single = get_scale_perms()
    assert sorted(grouped) == list(range(64)) and sorted(single) == list(range(32))
    assert grouped[:10] == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert single[:10] == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    scales = torch.rand(SIZE_K // 32, SIZE_N)
    found = marlin_permute_scales(scales, SIZE_K, SIZE_N, 32)
    assert torch.equal(found, torch.cat([part[:, grouped] for part in scales.split(64, 1)], 1))
    assert torch.equal(marlin_unpermute_scales(found, SIZE_K, SIZE_N, 32), scales)


@pytest.mark.parametrize("group_size", [-1, SIZE_K])
def test_scales_of_one_group_have_their_own_order(group_size: int) -> None:
    scales = torch.rand(1, SIZE_N)
    found = marlin_permute_scales(scales, SIZE_K, SIZE_N, group_size)
    assert torch.equal(found, torch.cat([part[:, get_scale_perms()[1]] for part in scales.split(32, 1)], 1))
    assert torch.equal(marlin_unpermute_scales(found, SIZE_K, SIZE_N, group_size), scales)


def test_constants() -> None:
    assert MARLIN_SUPPORTED_GROUP_SIZES == [-1, 32, 64, 128]
    assert (GPTQ_MARLIN_MIN_THREAD_N, GPTQ_MARLIN_MIN_THREAD_K, GPTQ_MARLIN_TILE) == (64, 128, 16)
    assert (SCALAR_TYPE_UINT4.id, SCALAR_TYPE_UINT4B8.id) == (1125899906843648, 1125899907892224)


@pytest.mark.parametrize("group_size", [16, 256, 0])
def test_group_sizes_without_a_kernel(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size={group_size}; it has \[-1, 32, 64, 128\]"):
        verify_marlin_supported(group_size)
    for known in MARLIN_SUPPORTED_GROUP_SIZES:
        verify_marlin_supported(known)


def test_shapes_without_a_kernel() -> None:
    verify_marlin_supports_shape(64, 128, 512, -1)
    verify_marlin_supports_shape(64, 128, 128, 128)
    with pytest.raises(
        ValueError, match=r"output_size_per_partition = 96 .* by 64; input_size_per_partition = 64 .* 128"
    ):
        verify_marlin_supports_shape(96, 64, 64, -1)
    with pytest.raises(ValueError, match="input_size_per_partition = 384 does not divide by 256"):
        verify_marlin_supports_shape(64, 384, 768, 256)


def test_small_things_of_the_kernel() -> None:
    workspace, g_idx = marlin_make_workspace(torch.device("cpu")), marlin_make_empty_g_idx(torch.device("cpu"))
    assert workspace.dtype == torch.int and not workspace.any()
    assert g_idx.shape == (0,) and not g_idx.requires_grad
    layer = torch.nn.Linear(3, 2)
    replace_parameter(layer, "weight", torch.ones(5, dtype=torch.int8))
    assert layer.weight.dtype == torch.int8 and layer.weight.shape == (5,) and not layer.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias"]
