"""NVFP4 arithmetic, exact to the bit, in plain torch on any device.

A weight becomes 4-bit E2M1 codes in blocks of 16 columns; every block has an E4M3 scale, and the whole fused
group of weights (q/k/v, gate/up) has one fp32 *global scale*, stored as a divisor:

    weight = code * block_scale / global_scale          global_scale = 448 * 6 / amax

Two programs define the bytes, and they disagree on a few percent of the block scales. Both are here:

- ``MODELOPT`` is ``NVFP4QTensor`` of NVIDIA ModelOpt, in fp32 throughout: what a training run exports.
- ``COMPRESSED_TENSORS`` is ``model_free_ptq`` of llm-compressor with the compressed-tensors library, which
  rounds amax, global scale and ``block_amax / 6`` in the dtype of the weight.

Why not shorter? Multiplying by a reciprocal instead of dividing is off by one ulp, and one ulp moves a code at a
rounding tie. torch takes reciprocals by itself: on CUDA it turns a division by a Python number or a CPU scalar into a
multiplication. So divisors here are tensors on the weight's device, and CPU and GPU make the same bytes. bf16 weights
on
a CPU need no floating point: tables hold this arithmetic evaluated on every bf16, fifty times faster (``e2m1.Tables``).
Weights on a GPU take one pass of a Triton kernel where Triton is installed (``e2m1_triton``).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.nvfp4_scales import (
    BLOCK,
    DTYPES,
    FP4_MAX,
    FP8_MAX,
    SCALE_RANGE,
    Scaling,
    global_scale,
    input_global_scale,
    learned_scale,
    static_scale,
    tensor_amax,
    unrounded_step,
)

__all__ = [
    "BLOCK", "FP4_MAX", "FP8_MAX", "SCALE_RANGE", "NVFP4Weight", "dequantize", "global_scale", "input_global_scale",
    "quantize", "tensor_amax",
]  # fmt: skip

_CPU_CHUNK = 1 << 18  # elements at a time: about 4 MB of fp32 scratch, which stays in the cache
_GPU_CHUNK = 1 << 22  # about 50 MB; with fewer, the time goes into kernel launches


@dataclass(frozen=True, slots=True)
class NVFP4Weight:
    """A quantized weight as compressed-tensors stores it (``nvfp4-pack-quantized``).

    - ``packed``: uint8 ``[out, in/2]``, two codes a byte, the even column in the low nibble, bit 3 the sign.
    - ``block_scale``: float8_e4m3fn ``[out, in/16]``.
    - ``global_scale``: fp32 ``(1,)``, a divisor.

    Raises:
        ValueError: a dtype or shape is wrong (engines cast and broadcast such tensors in silence).
    """

    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor

    def __post_init__(self) -> None:
        """Check dtypes and shapes."""
        rows, pairs = self.packed.shape if self.packed.ndim == 2 else (-1, -1)  # -1 matches no shape
        expected = (
            ("packed", self.packed, torch.uint8, (rows, pairs)),
            ("block_scale", self.block_scale, torch.float8_e4m3fn, (rows, pairs * 2 // BLOCK)),
            ("global_scale", self.global_scale, torch.float32, (1,)),
        )
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"NVFP4 {name} is {found}; expected {dtype} {shape}")


def quantize(
    weight: Tensor,
    amax: Tensor,
    *,
    arithmetic: Arithmetic,
    block_amax: Tensor | None = None,
    largest: float = FP8_MAX,
) -> NVFP4Weight:
    """Quantize one weight of a fused group.

    ``MODELOPT`` follows the exporter, ``NVFP4QTensor.quantize``. Where a block's effective scale is below
    1e-5, ModelOpt's fake-quantization kernel ``fp4_fake_quant_block`` substitutes 1.0, so the block becomes
    zero; the exporter keeps the scale, and so does this. ``COMPRESSED_TENSORS`` follows llm-compressor's
    ``model_free_ptq``.

    Works on chunks of rows to bound scratch memory; the bytes do not depend on the chunks.

    Args:
        weight: ``[out, in]``, bf16, fp16 or fp32.
        amax: one element, the maximum of the whole fused group: calibrated, or from `tensor_amax`. If it is
            smaller than the weight's own maximum, values saturate, as they did in training.
        arithmetic: whose rounding.
        block_amax: ``[out, in/16]``, the amax of each block where training kept them (ModelOpt's static
            block quantizer); without it, each block's own maximum. For ``MODELOPT`` only.
        largest: the largest block scale; `FOUR_OVER_SIX_MAX` needs ``block_amax``, in which training chose between
            a maximum of 4 and of 6.

    Raises:
        ValueError: the weight is not 2-D, its columns do not divide by 16, its dtype is not supported,
            it holds NaN or Inf, ``amax`` has more than one element or gives no finite, positive global scale, or
            ``block_amax`` has the wrong shape.
    """
    _check(weight, block_amax)
    if block_amax is None and largest != FP8_MAX:
        raise ValueError("four-over-six needs the amax that calibration chose for each block, and there are none")
    if e2m1.fits_triton(weight) and largest == FP8_MAX:
        return quantize_by_triton(weight, amax.cpu(), arithmetic, block_amax)
    scaling = Scaling.of(amax.to(weight.device), arithmetic, weight.dtype, largest)
    if block_amax is None and e2m1.fits_loops(weight):
        codes, scale_bytes = e2m1.quantize_by_tables(weight, BLOCK, _tables(scaling.key))
        return NVFP4Weight(codes, scale_bytes.view(torch.float8_e4m3fn), scaling.divisor)
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in _row_chunks(rows, columns, weight.device):
        blocks = weight[part].reshape(part.stop - part.start, columns // BLOCK, BLOCK)
        found = blocks.abs().amax(-1)
        if not found.isfinite().all():
            raise ValueError(e2m1.NOT_FINITE)
        if block_amax is not None:
            scale = static_scale(block_amax[part].to(weight.device), amax.to(weight.device).reshape(1), largest)
        else:
            scale = scaling.block_scale(found)
        packed[part] = e2m1.pack(e2m1.round_to_codes(blocks.float() / scaling.step(scale).unsqueeze(-1)).flatten(1))
        block_scale[part] = scale
    return NVFP4Weight(packed, block_scale, scaling.divisor)


def quantize_stack(
    weights: Tensor, amax: Tensor, *, arithmetic: Arithmetic, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize equal weights that lie one below the other, each as `quantize` does.

    Args:
        weights: ``[n * out, in]``.
        amax: fp32 ``[n]``, that of each weight's fused group, on the CPU.
        arithmetic: whose rounding.
        into: uint8 tensors for packed codes and block scales; None for new ones.

    Returns:
        Packed codes ``[n * out, in/2]``, block scales ``[n * out, in/16]`` and the stored divisors ``[n]``.

    Raises:
        ValueError: as `quantize`.
    """
    _check(weights, None)
    scaling = Scaling.of_groups(amax, arithmetic, weights.dtype)
    codes, scales = e2m1.empty_codes(weights, BLOCK) if into is None else into
    if e2m1.fits_triton(weights):
        from amaxbridge.export.kernels import e2m1_triton

        *_, bad = e2m1_triton.quantize_nvfp4_stack(
            weights,
            arithmetic=arithmetic,
            amax=amax,
            divisors=scaling.divisor,
            factors_2=scaling.factor_2,
            into=(codes, scales),
        )
        e2m1.check_finite(bad)
    else:
        each = len(weights) // len(amax)
        shares = zip(weights.split(each), codes.split(each), scales.split(each), strict=True)
        keys = zip(scaling.divisor.tolist(), scaling.factor_2.tolist(), strict=True)
        for (rows, codes_of_rows, scales_of_rows), of_group, key in zip(shares, amax.split(1), keys, strict=True):
            if e2m1.fits_loops(rows):
                e2m1.quantize_by_tables(rows, BLOCK, _tables((arithmetic, *key)), (codes_of_rows, scales_of_rows))
            else:
                quantized = quantize(rows, of_group, arithmetic=arithmetic)
                codes_of_rows.copy_(quantized.packed)
                scales_of_rows.copy_(quantized.block_scale.view(torch.uint8))
    return codes, scales.view(torch.float8_e4m3fn), scaling.divisor


def quantize_learned(weight: Tensor, amax: Tensor, post: Tensor, pre: Tensor, *, rounds_pre: bool) -> NVFP4Weight:
    """Quantize a weight whose block amax were learned (LSQ, Dual-LSQ), as ModelOpt's fake quantizer does.

    Codes are chosen under the scales of ``pre``; the scales of ``post`` are stored, under which they count.

    Args:
        weight: ``[out, in]``, bf16, fp16 or fp32.
        amax: one element, the maximum of the whole fused group.
        post, pre: ``[out, in/16]``, learned; the same tensor if training tied them.
        rounds_pre: False if the scales of ``pre`` are not rounded to E4M3.

    Raises:
        ValueError: as `quantize`, or a learned amax is NaN or Inf.
    """
    _check(weight, post)
    _check(weight, pre)
    if not (post.isfinite().all() and pre.isfinite().all()):
        raise ValueError("a learned amax is NaN or Inf")
    rows, columns = weight.shape
    of_group = amax.to(weight.device)
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in _row_chunks(rows, columns, weight.device):
        blocks = weight[part].reshape(part.stop - part.start, columns // BLOCK, BLOCK).float()
        if not blocks.isfinite().all():
            raise ValueError(e2m1.NOT_FINITE)
        before = pre[part].to(weight.device)
        step = learned_scale(before, of_group)[1] if rounds_pre else unrounded_step(before)
        packed[part] = e2m1.pack(e2m1.round_to_codes(blocks / step.unsqueeze(-1)).flatten(1))
        block_scale[part] = learned_scale(post[part].to(weight.device), of_group)[0]
    divisor = global_scale(of_group, arithmetic=Arithmetic.MODELOPT, dtype=weight.dtype)
    return NVFP4Weight(packed, block_scale, divisor)


def _check(weight: Tensor, block_amax: Tensor | None) -> None:
    if weight.ndim != 2 or weight.shape[1] % BLOCK:
        raise ValueError(f"NVFP4 needs [out, in] with in % {BLOCK} == 0, not shape {tuple(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"NVFP4 quantizes bf16, fp16 and fp32 weights, not {weight.dtype}")
    if block_amax is not None and tuple(block_amax.shape) != (weight.shape[0], weight.shape[1] // BLOCK):
        raise ValueError(f"block amax {tuple(block_amax.shape)} does not fit weight {tuple(weight.shape)}")


def dequantize(w: NVFP4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return ``code * (block_scale / global_scale)``, ``[out, in]``, computed in fp32 and cast to ``dtype``.

    This is compressed-tensors' ``NVFP4PackedCompressor.decompress``. vLLM inverts the global scale when it
    loads and multiplies, ``code * (block_scale * (1 / global_scale))``; ModelOpt multiplies by
    ``weight_scale_2``. In fp32 these differ by two ulps at most; in bf16 by one, and only where the exact
    value is next to a rounding tie.
    """
    rows, columns = w.packed.shape[0], w.packed.shape[1] * 2
    out = torch.empty(rows, columns, dtype=dtype, device=w.packed.device)
    for part in _row_chunks(rows, columns, w.packed.device):
        step = w.block_scale[part].float() / w.global_scale
        codes = e2m1.unpack(w.packed[part]).reshape(part.stop - part.start, columns // BLOCK, BLOCK)
        out[part] = (codes * step.unsqueeze(-1)).flatten(1)
    return out


@lru_cache(maxsize=16)  # the members of a fused group, and the chunks of a large weight, come one after the other
def _tables(key: tuple[Arithmetic, float, float]) -> e2m1.Tables:
    """The arithmetic of a group, evaluated on every bf16. The key is `Scaling.key`: tensors cannot be keys."""
    arithmetic, divisor, factor_2 = key
    scaling = Scaling(arithmetic, torch.tensor([divisor]), torch.tensor([factor_2]))
    every_scale = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return e2m1.Tables.of(scaling.block_scale(e2m1.magnitudes()).view(torch.uint8), scaling.step(every_scale))


def quantize_by_triton(weight: Tensor, amax: Tensor, arithmetic: Arithmetic, block_amax: Tensor | None) -> NVFP4Weight:
    """Makes the group's scales on the CPU and passes them as numbers; the GPU reports a weight that is not finite."""
    from amaxbridge.export.kernels import e2m1_triton

    scaling = Scaling.of(amax, arithmetic, weight.dtype)
    _, divisor, factor_2 = scaling.key
    codes, scales, bad = e2m1_triton.quantize_nvfp4(
        weight,
        arithmetic=arithmetic,
        amax=amax.float().item(),
        divisor=divisor,
        factor_2=factor_2,
        block_amax=block_amax,
    )
    stored = torch.full((1,), divisor, device=weight.device)
    e2m1.check_finite(bad)
    return NVFP4Weight(codes, scales, stored)


def _row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    step = max(1, chunk // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
