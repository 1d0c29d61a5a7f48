"""The weight layout of Marlin, the GPU kernel for 4 and 8 bits: exact to the bit, and reversible.

The input is a weight as GPTQ packs it, int32 `[in / per word, out]`: the codes of consecutive inputs in one word, the
first in the low bits. It is cut into tiles of 16 inputs and 64 outputs, and the codes of a tile are ordered so that
each of the 32 threads of a warp reads exactly what its tensor core needs. With t = thread, w = 0 … 3:

    inputs    (t % 4) * 2 + {0, 1, 8, 9}          four codes of a column
    outputs   w * 16 + t // 4, and the same + 8   two columns
    4 bits    word t * 4 + w: both columns, in the order 0 2 4 6 1 3 5 7
    8 bits    words t * 8 + w * 2 + {0, 1}: a column each, in the order 0 2 1 3

`_tile_order` is that table: packing gathers by it, unpacking by its inverse. With act-order, inputs are first sorted by
group. Scales are permuted over outputs likewise. The kernel itself is not here: `triton_kernels.py` reads this layout
on a GPU, and on a CPU it is unpacked.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from amaxbridge.export.kernels.scaled import pack_codes, unpack_codes

MARLIN_SUPPORTED_GROUP_SIZES = [-1, 32, 64, 128]
GPTQ_MARLIN_MIN_THREAD_N = 64
GPTQ_MARLIN_MIN_THREAD_K = 128
GPTQ_MARLIN_TILE = 16

_TILE_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class ScalarType:
    """An unsigned integer type of a kernel's codes.

    Args:
        size_bits: bits of a code.
        bias: what a code exceeds its value by; 0 where zero points say it.
    """

    size_bits: int
    bias: int

    @property
    def name(self) -> str:
        """`uint4`, or `uint4b8` with a bias."""
        return f"uint{self.size_bits}{f'b{self.bias}' if self.bias else ''}"

    @property
    def id(self) -> int:
        """vLLM's number of the type: exponent:8, mantissa:8, signed:1, bias:32, finite:1, nan_repr:8."""
        ieee_nan = 1
        return self.size_bits << 8 | self.bias << 17 | ieee_nan << 50


SCALAR_TYPE_UINT4 = ScalarType(4, bias=0)
"""Codes 0 … 15 with zero points."""
SCALAR_TYPE_UINT4B8 = ScalarType(4, bias=8)
"""Codes 0 … 15 that stand for -8 … 7."""


def verify_marlin_supported(group_size: int) -> None:
    """Check a group size; -1 is one scale for all inputs.

    Raises:
        ValueError: Marlin has no kernel for it.
    """
    if group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        raise ValueError(f"Marlin has no group_size={group_size}; it has {MARLIN_SUPPORTED_GROUP_SIZES}")


def verify_marlin_supports_shape(
    output_size_per_partition: int, input_size_per_partition: int, input_size: int, group_size: int
) -> None:
    """Check the sizes of one rank's layer.

    Raises:
        ValueError: a size does not divide; names all that do not, and what would.
    """
    wanted = [
        ("output_size_per_partition", output_size_per_partition, GPTQ_MARLIN_MIN_THREAD_N),
        ("input_size_per_partition", input_size_per_partition, GPTQ_MARLIN_MIN_THREAD_K),
    ]
    if group_size not in (-1, input_size):
        wanted.append(("input_size_per_partition", input_size_per_partition, group_size))
    wrong = [f"{name} = {size} does not divide by {divisor}" for name, size, divisor in wanted if size % divisor]
    if wrong:
        raise ValueError(f"Marlin cannot hold this layer: {'; '.join(wrong)}. Use fewer tensor-parallel ranks")


def marlin_make_workspace(device: torch.device) -> Tensor:
    """The kernel's locks: int32 zeros, one for each multiprocessor; on a CPU, one."""
    on_gpu = torch.device(device).type == "cuda"
    locks = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    return torch.zeros(locks, dtype=torch.int, device=device)


def marlin_make_empty_g_idx(device: torch.device) -> nn.Parameter:
    """The empty tensor that stands for groups and input order without act-order."""
    return nn.Parameter(torch.empty(0, dtype=torch.int, device=device), requires_grad=False)


def get_scale_perms() -> tuple[list[int], list[int]]:
    """The source index of each permuted scale: of 64 outputs with groups, of 32 with one scale for all inputs."""
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return grouped, single


def marlin_permute_scales(s: Tensor, size_k: int, size_n: int, group_size: int) -> Tensor:
    """Permutes scales `[groups, out]` into the kernel's order.

    Args:
        s: scales, one row for each group of inputs.
        size_k: number of inputs.
        size_n: number of outputs.
        group_size: inputs that share a scale; -1 for all.
    """
    return _reorder(s, _scale_order(size_k, group_size), size_n)


def marlin_unpermute_scales(s: Tensor, size_k: int, size_n: int, group_size: int) -> Tensor:
    """The inverse of `marlin_permute_scales`."""
    return _reorder(s, _inverse(_scale_order(size_k, group_size)), size_n)


def marlin_repack(packed: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    """Repacks a weight into Marlin's tiles.

    Args:
        packed: int32 `[in / per word, out]`, consecutive inputs in a word.
        perm: the order of inputs under act-order, `[in]`; empty to keep the order.
        size_k: number of inputs, a multiple of 16.
        size_n: number of outputs, a multiple of 64.
        num_bits: 4 or 8.

    Returns:
        int32 `[in / 16, out * 16 / per word]`.
    """
    codes = unpack_codes(packed.T.contiguous(), size_k, num_bits).T
    if perm.numel():
        codes = codes[perm.long()]
    tiles = codes.reshape(size_k // GPTQ_MARLIN_TILE, GPTQ_MARLIN_TILE, size_n // _TILE_COLUMNS, _TILE_COLUMNS)
    ordered = tiles.transpose(1, 2).flatten(2)[..., _tile_order(num_bits).to(packed.device)]
    return pack_codes(ordered.reshape(size_k // GPTQ_MARLIN_TILE, -1), num_bits)


def marlin_unpack(repacked: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    """The inverse of `marlin_repack`: int32 `[in / per word, out]`."""
    codes = unpack_codes(repacked, size_n * GPTQ_MARLIN_TILE, num_bits)
    order = _inverse(_tile_order(num_bits)).to(repacked.device)
    tiles = codes.reshape(-1, size_n // _TILE_COLUMNS, GPTQ_MARLIN_TILE * _TILE_COLUMNS)[..., order]
    codes = tiles.unflatten(2, (GPTQ_MARLIN_TILE, _TILE_COLUMNS)).transpose(1, 2).reshape(size_k, size_n)
    if perm.numel():
        codes = codes[_inverse(perm.long())]
    return pack_codes(codes.T.contiguous(), num_bits).T.contiguous()


def has_groups(size_k: int, group_size: int) -> bool:
    """True if the inputs have more than one scale, which decides the order of the scales."""
    return group_size != -1 and group_size < size_k


@cache
def _tile_order(num_bits: int) -> Tensor:
    """For each place in a packed tile, the flat index of its element in the tile `[16, 64]`."""
    order = []
    for thread in range(32):
        for w in range(4):
            inputs = [(thread % 4) * 2 + offset for offset in (0, 1, 8, 9)]
            columns = [w * 16 + thread // 4, w * 16 + thread // 4 + 8]
            codes = [row * _TILE_COLUMNS + column for column in columns for row in inputs]
            places = (0, 2, 4, 6, 1, 3, 5, 7) if num_bits == 4 else (0, 2, 1, 3, 4, 6, 5, 7)
            order += [codes[place] for place in places]
    return torch.tensor(order, device="cpu")  # on the CPU, because it is cached, whatever the default device


def _scale_order(size_k: int, group_size: int) -> Tensor:
    grouped, single = get_scale_perms()
    return torch.tensor(grouped if has_groups(size_k, group_size) else single, device="cpu")


def _reorder(s: Tensor, order: Tensor, size_n: int) -> Tensor:
    return s.reshape(-1, len(order))[:, order.to(s.device)].reshape(-1, size_n).contiguous()


def _inverse(order: Tensor) -> Tensor:
    return order.argsort()
