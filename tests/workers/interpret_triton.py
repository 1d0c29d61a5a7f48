"""The Triton kernels in Triton's interpreter, on a CPU, beside plain torch: what a machine without a GPU can show.

    TRITON_INTERPRET=1 python interpret_triton.py

The interpreter has no fused multiply-add and rounds to bf16 and E4M3 wrongly, so the ways around them are taken here;
`tests/gpu` runs the ways of the hardware. It takes a tenth of a second for a launch: one weight holds all hard cases.
"""

import torch
from torch import Tensor

from amaxbridge.export.kernels import (
    amax_triton,
    e2m1_triton,
    e4m3_triton,
    mx,
    nvfp4,
    nvfp4_scales,
    scaled,
)
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Blocks, Code
from tests.support.hard_weights import WEIGHTS, same_bytes

MODELOPT, COMPRESSED_TENSORS = Arithmetic.MODELOPT, Arithmetic.COMPRESSED_TENSORS


def main() -> None:
    hard = torch.cat(
        [make().flatten()[: 2048 if kind == "block scale ties" else 512] for kind, make in WEIGHTS.items()]
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = hard.view(4, -1).to(dtype)
        check_amax(weight)
        for arithmetic in Arithmetic:
            check_nvfp4(weight, arithmetic, nvfp4.tensor_amax([weight], arithmetic=arithmetic) * 0.01)
            check_stack(weight, arithmetic, nvfp4.tensor_amax([weight], arithmetic=arithmetic) * 0.01)
            check_mx(weight, arithmetic)
        check_nvfp4(weight, MODELOPT, torch.tensor(0.3), weight.float().abs().unflatten(1, (-1, 16)).amax(-1) * 1.3)
        for blocks in (Blocks(), Blocks(None, None), Blocks(3, 384)):
            check_fp8(weight, blocks)


def check_amax(weight: Tensor) -> None:
    found = amax_triton.tensor_amax([weight[:9], weight[9:]])
    assert found == weight.abs().max()
    bad = weight.clone()
    bad[3, 5] = torch.nan
    assert amax_triton.tensor_amax([bad, weight]).isnan()


def check_nvfp4(weight: Tensor, arithmetic: Arithmetic, amax: Tensor, block_amax: Tensor | None = None) -> None:
    expected = nvfp4.quantize(weight, amax, arithmetic=arithmetic, block_amax=block_amax)
    found = nvfp4.quantize_by_triton(weight, amax, arithmetic, block_amax)
    for name in ("packed", "block_scale", "global_scale"):
        assert same_bytes(getattr(found, name), getattr(expected, name)), (name, weight.dtype, arithmetic)


def check_stack(weight: Tensor, arithmetic: Arithmetic, amax: Tensor) -> None:
    """Rows as weights of their own."""
    of_rows = torch.stack([amax * factor for factor in (0.5, 1.0, 2.0, 0.01)])
    scaling = nvfp4_scales.Scaling.of_groups(of_rows, arithmetic, weight.dtype)
    codes, scales, bad = e2m1_triton.quantize_nvfp4_stack(
        weight, arithmetic=arithmetic, amax=of_rows, divisors=scaling.divisor, factors_2=scaling.factor_2
    )
    assert not bad.item()
    for row, of_row in enumerate(of_rows):
        expected = nvfp4.quantize(weight[row : row + 1], of_row, arithmetic=arithmetic)
        assert same_bytes(codes[row : row + 1], expected.packed), (row, weight.dtype, arithmetic)
        assert same_bytes(scales[row : row + 1], expected.block_scale), (row, weight.dtype, arithmetic)


def check_mx(weight: Tensor, arithmetic: Arithmetic) -> None:
    for quantize, kernel in (
        (mx.quantize_mxfp4, e2m1_triton.quantize_mxfp4),
        (mx.quantize_mxfp8, e4m3_triton.quantize_mxfp8),
    ):
        codes, exponents, bad = kernel(weight, arithmetic)
        expected = quantize(weight, arithmetic)
        assert same_bytes(codes, expected[0]), (quantize, weight.dtype, arithmetic)
        assert same_bytes(exponents, expected[1]), (quantize, weight.dtype, arithmetic)
        assert not bad.item()
        broken = weight.clone()
        broken[-1, -1] = -torch.inf
        assert kernel(broken, MODELOPT)[2].item()


def check_fp8(weight: Tensor, blocks: Blocks) -> None:
    shape = blocks.shape(*weight.shape)
    found = e4m3_triton.largest(weight, *blocks.size(weight), shape)
    assert same_bytes(found.to(weight.dtype), scaled.largest(weight, blocks))
    for amax in (None, found * 0.7):
        expected = scaled.quantize(weight, Code.E4M3, blocks, amax=amax)
        bound = torch.full_like(found, 448.0)
        factor = expected.scale if amax is None else bound / amax.where(amax > 0, bound)
        arithmetic = COMPRESSED_TENSORS if amax is None else MODELOPT
        codes, bad = e4m3_triton.encode(weight, factor, *blocks.size(weight), arithmetic)
        assert same_bytes(codes, expected.codes), (weight.dtype, blocks, amax is None)
        assert not bad.item()


if __name__ == "__main__":
    main()
