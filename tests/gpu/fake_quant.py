"""ModelOpt's own fake quantization of a weight on a GPU against our dequantized export, element by element.

    python3 -m tests.gpu.fake_quant [--cpu]

The fake quantizer is what training saw: a Triton kernel, whose `/` is not IEEE, with a global scale that torch makes on
the GPU by a reciprocal. The export has the arithmetic of ModelOpt's exporter, which is IEEE. So they may part:

- `tie`: where the quotient of an element lies next to a bound between two codes;
- `scale tie`: where the scale of a block lies next to a rounding tie of E4M3, so that the whole block moves;
- `tiny block`: where a block's step is below 1e-5, for which the fake quantizer alone takes 1.0;
- `last bits`: the same code, and products that round otherwise: global scale, block's step, value, one after another,
  so up to 4 ulp in fp32, and one in shorter formats.

"Next to" is within 2^-20. Anything else is a failure, status 1. The last column counts elements where our dequantized
weight is not the exporter's, which multiplies by `amax / 2688` where compressed-tensors divides by its reciprocal.
"""

import argparse
import sys

import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.nvfp4 import NVFP4Weight, dequantize, quantize

BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between E2M1 values
NEAR = 2.0**-20
REASONS = ("tie", "scale tie", "tiny block", "last bits", "unexplained")
LEAST_STEP = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true", help="rehearse on a CPU, with the fake quantizer of bridge.cpu")
    on_cpu = parser.parse_args().cpu
    rows, device = (256, "cpu") if on_cpu else (4096, "cuda")
    failed = False
    print(f"[{rows}, 4096] | amax | differ | {' | '.join(REASONS)} | export ≠ exporter")
    print("|".join(["---"] * (len(REASONS) + 4)))
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for std, factor in ((0.02, 1.0), (0.02, 0.7), (0.02, 1.37), (1.0, 1.0), (2e-5, 1.0)):
            weight = (torch.randn(rows, 4096, generator=generator) * std).to(dtype)
            amax = weight.abs().max().float() * factor
            fake = fake_quantized(weight.to(device), amax.to(device)).cpu()
            exported = quantize(weight.to(device), amax, arithmetic=Arithmetic.MODELOPT)
            exported = NVFP4Weight(*(getattr(exported, name).cpu() for name in NVFP4Weight.__slots__))
            counts, elsewhere = compared(weight, amax, fake, exported)
            failed |= counts["unexplained"] > 0
            cells = " | ".join(str(counts[reason]) for reason in REASONS)
            label = f"{str(dtype).removeprefix('torch.')}, std {std}"
            print(f"{label} | {factor}× | {sum(counts.values())} | {cells} | {elsewhere}", flush=True)
    sys.exit(failed)


def fake_quantized(weight: Tensor, amax: Tensor) -> Tensor:
    """What ModelOpt's weight quantizer makes of a weight."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    from amaxbridge.bridge.megatron.without_cuda import without_cuda

    blocks = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=blocks))
    quantizer.amax = amax
    with without_cuda():
        found: Tensor = quantizer(weight)
    return found


def compared(weight: Tensor, amax: Tensor, fake: Tensor, exported: NVFP4Weight) -> tuple[dict[str, int], int]:
    """Counts the elements that differ from the fake quantizer, by reason, and those that our scale changes."""
    factor_2 = amax / torch.full_like(amax, 2688.0)
    step = (exported.block_scale.float() * factor_2).repeat_interleave(16, 1)
    expected = e2m1.unpack(exported.packed) * step
    differ = fake != expected.to(weight.dtype)
    quotient = weight.float().abs() / step
    next_to_bound = torch.stack([(quotient - bound).abs() <= bound * NEAR for bound in BOUNDS]).any(0)
    block_amax = weight.float().abs().unflatten(1, (-1, 16)).amax(-1)
    scale = block_amax / (6.0 * factor_2)
    low, high = ((scale * (1 + side)).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() for side in (-NEAR, NEAR))
    rounding = max(torch.finfo(weight.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    last_bits = (fake.float() - expected).abs() <= expected.abs() * rounding
    reasons = {
        "tie": next_to_bound,
        "scale tie": (low != high).repeat_interleave(16, 1),
        "tiny block": step < LEAST_STEP,
        "last bits": last_bits,
        "unexplained": torch.ones_like(differ),
    }
    counts = {}
    for reason, fits in reasons.items():
        counts[reason] = int((differ & fits).sum())
        differ = differ & ~fits
    return counts, int((dequantize(exported, weight.dtype) != expected.to(weight.dtype)).sum())


if __name__ == "__main__":
    main()
