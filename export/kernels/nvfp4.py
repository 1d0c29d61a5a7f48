"""NVFP4 arithmetic, exact to the bit, in plain torch on any device.

A weight becomes 4-bit E2M1 codes in blocks of 16 columns; every block has an E4M3 scale, and the whole fused
group of weights (q/k/v, gate/up) has one fp32 *global scale*, stored as a divisor:

    weight = code * block_scale / global_scale          global_scale = 448 * 6 / amax

Two programs define what the bytes are, and they disagree on a few percent of the block scales; both are here:

- ``MODELOPT`` is ``NVFP4QTensor`` of NVIDIA ModelOpt, in fp32 throughout: what a training run exports.
- ``COMPRESSED_TENSORS`` is ``model_free_ptq`` of llm-compressor with the compressed-tensors library, which
  rounds amax, global scale and ``block_amax / 6`` in the dtype of the weight.

Why not the obvious, shorter ways? Multiplying by a reciprocal instead of dividing is off by one ulp, and one
ulp moves a code at a rounding tie. That includes the reciprocals that torch takes by itself: on CUDA it turns
a division by a Python number or by a CPU scalar into a multiplication. Hence divisors here are tensors on the
weight's device, and CPU and GPU give the same bytes. ``searchsorted`` is how ModelOpt rounds to E2M1; seven
comparisons say the same, treat ties to even without a correction, and are faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

BLOCK = 16
"""Columns that share one block scale."""
FP4_MAX = 6.0
"""Largest E2M1 value."""
FP8_MAX = 448.0
"""Largest E4M3 value."""

_SCALE_RANGE = FP4_MAX * FP8_MAX
_FP8_TINY = 2.0**-9  # smallest positive (subnormal) E4M3 value
_CPU_CHUNK = 1 << 18  # elements at a time: about 4 MB of fp32 scratch, which stays in the cache
_GPU_CHUNK = 1 << 22  # about 50 MB; with fewer, the time goes into kernel launches
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Arithmetic(StrEnum):
    """Whose rounding is reproduced; see the module's docstring."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed_tensors"


@dataclass(frozen=True, slots=True)
class NVFP4Weight:
    """A quantized weight as compressed-tensors stores it (``nvfp4-pack-quantized``).

    - ``packed``: uint8 ``[out, in/2]``, two codes a byte, the even column in the low nibble, bit 3 the sign.
    - ``block_scale``: float8_e4m3fn ``[out, in/16]``.
    - ``global_scale``: fp32 ``(1,)``, a divisor.

    Raises:
        ValueError: a dtype or a shape is another one (engines cast and broadcast such tensors in silence).
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


def tensor_amax(weights: Sequence[Tensor], *, arithmetic: Arithmetic) -> Tensor:
    """Return the largest ``|w|`` of one fused group: fp32, 0-d, on the first weight's device.

    Args:
        weights: the weights ``[out, in]`` of the group, which share one global scale.
        arithmetic: ``COMPRESSED_TENSORS`` never goes below the smallest normal number of fp32 (and of bf16),
            as compressed-tensors' ``generate_gparam``; ``MODELOPT`` returns the plain maximum, 0 included.

    Raises:
        ValueError: no weights, an empty one, an unsupported dtype, or, for ``COMPRESSED_TENSORS``, mixed
            dtypes: its global scale is rounded in the weight's dtype, so the group could not share one.
    """
    if not weights:
        raise ValueError("NVFP4 amax of no weights: pass the weights of one fused group")
    shapes = [tuple(weight.shape) for weight in weights]
    if any(weight.numel() == 0 for weight in weights):
        raise ValueError(f"NVFP4 amax of an empty weight: the group's shapes are {shapes}")
    dtypes = {_rounding_dtype(weight.dtype) for weight in weights}
    if arithmetic == Arithmetic.COMPRESSED_TENSORS and len(dtypes) > 1:
        names = sorted(str(weight.dtype) for weight in weights)
        raise ValueError(f"NVFP4 group of shapes {shapes} mixes {', '.join(names)}: cast it to one dtype")
    extremes = [torch.stack(torch.aminmax(weight)).abs().max() for weight in weights]
    amax = torch.stack([extreme.to(weights[0].device, torch.float32) for extreme in extremes]).max()
    if arithmetic == Arithmetic.COMPRESSED_TENSORS:
        amax = amax.clamp(min=torch.finfo(torch.float32).tiny)
    return amax


def global_scale(amax: Tensor, *, arithmetic: Arithmetic, dtype: torch.dtype) -> Tensor:
    """Return the stored divisor of a fused group: fp32 ``(1,)``, ``448 * 6 / amax``.

    - ``MODELOPT``: ``1 / weight_scale_2`` with ``weight_scale_2 = amax / 2688`` of ``NVFP4QTensor``'s
      ``get_weights_scaling_factor_2``, inverted as compressed-tensors' ``ModelOptNvfp4Converter`` does.
    - ``COMPRESSED_TENSORS``: compressed-tensors' ``generate_gparam``. ``2688 / amax`` is a reciprocal and a
      product in torch, so it rounds twice in ``dtype``; NaN and Inf become 1.0. In fp16 that overflows for
      every amax below 0.041 and llm-compressor goes on without a global scale; here an fp16 weight is
      computed in fp32.

    Args:
        amax: the group's maximum, one element, on any device.
        arithmetic: whose rounding.
        dtype: the weight's dtype.

    Raises:
        ValueError: ``amax`` has more than one element, or gives a divisor that is not finite and positive.
    """
    if arithmetic == Arithmetic.MODELOPT:
        return input_global_scale(amax)
    rounded = _one_element(amax).to(_rounding_dtype(dtype))
    divisor = torch.nan_to_num(rounded.reciprocal() * _SCALE_RANGE, nan=1.0, posinf=1.0, neginf=1.0)
    return _checked_divisor(divisor.float(), amax)


def input_global_scale(amax: Tensor) -> Tensor:
    """Return the stored divisor for activations: fp32 ``(1,)``, ``1 / (amax / 2688)``, rounded twice.

    ``amax / 2688`` is ``NVFP4QTensor.get_activation_scaling_factor``; compressed-tensors stores its inverse.
    ModelOpt's exporter replaces an amax of 0 or NaN by 6.0; that is a policy, so here it is an error.

    Raises:
        ValueError: ``amax`` has more than one element, or gives a divisor that is not finite and positive.
    """
    return _checked_divisor(_scaling_factor_2(_one_element(amax)).reciprocal(), amax)


def quantize(weight: Tensor, amax: Tensor, *, arithmetic: Arithmetic, block_amax: Tensor | None = None) -> NVFP4Weight:
    """Quantize one weight of a fused group.

    ``MODELOPT`` follows the exporter, ``NVFP4QTensor.quantize``. Where a block's effective scale is below
    1e-5, ModelOpt's fake-quantization kernel ``fp4_fake_quant_block`` substitutes 1.0, so the block becomes
    zero; the exporter keeps the scale, and so does this. ``COMPRESSED_TENSORS`` follows llm-compressor's
    ``model_free_ptq``.

    Rows are worked on in chunks, so that scratch memory stays bounded; the bytes do not depend on them.
    A NaN in the weight shows as a NaN block scale.

    Args:
        weight: ``[out, in]``, bf16, fp16 or fp32.
        amax: one element, the maximum of the whole fused group: calibrated, or from `tensor_amax`. Where it
            is smaller than the weight's own maximum, values saturate, as they did in training.
        arithmetic: whose rounding.
        block_amax: ``[out, in/16]``, the amax of each block where training kept them (ModelOpt's static
            block quantizer); without it, each block's own maximum. For ``MODELOPT`` only.

    Raises:
        ValueError: the weight is not 2-D, its columns do not divide by 16, its dtype is another one,
            ``amax`` is more than one element or gives no finite, positive global scale, or ``block_amax``
            has another shape.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK:
        raise ValueError(f"NVFP4 needs [out, in] with in % {BLOCK} == 0, not shape {tuple(weight.shape)}")
    if weight.dtype not in _DTYPES:
        raise ValueError(f"NVFP4 quantizes bf16, fp16 and fp32 weights, not {weight.dtype}")
    if block_amax is not None and tuple(block_amax.shape) != (weight.shape[0], weight.shape[1] // BLOCK):
        raise ValueError(f"block amax {tuple(block_amax.shape)} does not fit weight {tuple(weight.shape)}")
    amax = amax.to(weight.device)
    divisor = global_scale(amax, arithmetic=arithmetic, dtype=weight.dtype)
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in _row_chunks(rows, columns, weight.device):
        blocks = weight[part].reshape(part.stop - part.start, columns // BLOCK, BLOCK)
        if block_amax is not None:
            scale, step = _static_scales(block_amax[part].to(weight.device), _one_element(amax))
        elif arithmetic == Arithmetic.MODELOPT:
            scale, step = _modelopt_scales(blocks, _scaling_factor_2(_one_element(amax)))
        else:
            scale, step = _compressed_tensors_scales(blocks, divisor)
        codes = _round_to_e2m1(blocks.float() / step.unsqueeze(-1)).flatten(1)
        packed[part] = codes[:, 0::2] | (codes[:, 1::2] << 4)
        block_scale[part] = scale
    return NVFP4Weight(packed, block_scale, divisor)


def dequantize(w: NVFP4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return ``code * (block_scale / global_scale)``, ``[out, in]``, computed in fp32 and cast to ``dtype``.

    This is compressed-tensors' ``NVFP4PackedCompressor.decompress``. vLLM inverts the global scale when it
    loads and multiplies, ``code * (block_scale * (1 / global_scale))``; ModelOpt multiplies by
    ``weight_scale_2``. In fp32 these differ by two ulps at most; in bf16 by one, and only where the exact
    value is next to a rounding tie.
    """
    rows, columns = w.packed.shape[0], w.packed.shape[1] * 2
    values = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), device=w.packed.device)
    byte = torch.arange(256, device=w.packed.device)
    pairs = torch.stack((values[byte & 0xF], values[byte >> 4]), dim=-1)  # [256, 2]
    out = torch.empty(rows, columns, dtype=dtype, device=w.packed.device)
    for part in _row_chunks(rows, columns, w.packed.device):
        step = w.block_scale[part].float() / w.global_scale
        codes = pairs[w.packed[part].int()].reshape(part.stop - part.start, columns // BLOCK, BLOCK)
        out[part] = (codes * step.unsqueeze(-1)).flatten(1)
    return out


def _modelopt_scales(blocks: Tensor, scaling_factor_2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the E4M3 and the fp32 effective scales ``[rows, in/16]`` of blocks ``[rows, in/16, 16]``."""
    block_amax = blocks.abs().amax(-1).float()
    scale = block_amax / (FP4_MAX * scaling_factor_2)
    scale = torch.where(scale == 0, 1.0, scale).clamp(_FP8_TINY, FP8_MAX).to(torch.float8_e4m3fn)
    return scale, scale.float() * scaling_factor_2


def _static_scales(block_amax: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return both scales from calibrated block amax ``[rows, in/16]``, in the order of operations of ModelOpt's
    ``get_weights_scaling_factor_from_quantizer``.
    """
    limit = torch.full_like(block_amax, FP4_MAX)
    scale = block_amax.float() / limit
    scale = torch.where(scale == 0, 1.0, scale) * FP8_MAX / (amax.float() / limit[:1, :1])
    rounded = scale.clamp(_FP8_TINY, FP8_MAX).to(torch.float8_e4m3fn)
    return rounded, rounded.float() * _scaling_factor_2(amax)


def _compressed_tensors_scales(blocks: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the E4M3 and the fp32 effective scales ``[rows, in/16]`` of blocks ``[rows, in/16, 16]``."""
    block_amax = blocks.abs().amax(-1).to(_rounding_dtype(blocks.dtype))
    scale = (block_amax / torch.full_like(block_amax, FP4_MAX)).float() * divisor
    rounded = scale.clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
    rounded = torch.where(rounded == 0, 0.125, rounded)  # compressed-tensors' "eps" of E4M3
    return rounded.to(torch.float8_e4m3fn), rounded / divisor


def _round_to_e2m1(scaled: Tensor) -> Tensor:
    """Return E2M1 codes (uint8) of fp32 values: nearest, ties to even, saturating at 6; -0.0 is code 0."""
    magnitude = scaled.abs()
    codes = (scaled < 0).to(torch.uint8) << 3
    for bound in (0.25, 1.25, 2.5, 5.0):
        codes += magnitude > bound
    for bound in (0.75, 1.75, 3.5):
        codes += magnitude >= bound
    return codes


def _scaling_factor_2(amax: Tensor) -> Tensor:
    amax = amax.float()
    return amax / torch.full_like(amax, _SCALE_RANGE)  # a tensor on the device: see the module's docstring


def _one_element(amax: Tensor) -> Tensor:
    if amax.numel() != 1:
        raise ValueError(f"NVFP4 needs one amax for a fused group; this one has shape {tuple(amax.shape)}")
    return amax.reshape(1)


def _checked_divisor(divisor: Tensor, amax: Tensor) -> Tensor:
    if not 0.0 < divisor.item() < float("inf"):
        raise ValueError(f"NVFP4 amax {amax.item()} gives scale {divisor.item()}: not positive and finite")
    return divisor


def _rounding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that compressed-tensors rounds in; fp16 is replaced, see `global_scale`."""
    if dtype not in _DTYPES:
        raise ValueError(f"NVFP4 quantizes bf16, fp16 and fp32 weights, not {dtype}")
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    step = max(1, chunk // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
