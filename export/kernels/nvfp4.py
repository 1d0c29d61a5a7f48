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
weight's device, and CPU and GPU give the same bytes. bf16 weights on a CPU take a way without floating point, from
tables that are this arithmetic evaluated on every bf16: fifty times faster, the same bytes (``e2m1.Tables``). Weights
on a GPU take Triton kernels where there is Triton (``e2m1_triton``): the same bytes in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from export.kernels import e2m1
from mappings.tensors import max_of

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
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Arithmetic(StrEnum):
    """Whose rounding is reproduced; see the module's docstring."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed_tensors"

    @classmethod
    def of(cls, *, calibrated: bool) -> "Arithmetic":
        """Training's where an amax was calibrated, else the peer's."""
        return cls.MODELOPT if calibrated else cls.COMPRESSED_TENSORS


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
    if all(map(e2m1.fits_triton, weights)):
        from export.kernels import amax_triton

        amax = amax_triton.tensor_amax(weights)
    else:
        amax = max_of([_largest(weight).to(weights[0].device, torch.float32) for weight in weights])
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

    Args:
        weight: ``[out, in]``, bf16, fp16 or fp32.
        amax: one element, the maximum of the whole fused group: calibrated, or from `tensor_amax`. Where it
            is smaller than the weight's own maximum, values saturate, as they did in training.
        arithmetic: whose rounding.
        block_amax: ``[out, in/16]``, the amax of each block where training kept them (ModelOpt's static
            block quantizer); without it, each block's own maximum. For ``MODELOPT`` only.

    Raises:
        ValueError: the weight is not 2-D, its columns do not divide by 16, its dtype is another one,
            it holds NaN or Inf, ``amax`` is more than one element or gives no finite, positive global scale, or
            ``block_amax`` has another shape.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK:
        raise ValueError(f"NVFP4 needs [out, in] with in % {BLOCK} == 0, not shape {tuple(weight.shape)}")
    if weight.dtype not in _DTYPES:
        raise ValueError(f"NVFP4 quantizes bf16, fp16 and fp32 weights, not {weight.dtype}")
    if block_amax is not None and tuple(block_amax.shape) != (weight.shape[0], weight.shape[1] // BLOCK):
        raise ValueError(f"block amax {tuple(block_amax.shape)} does not fit weight {tuple(weight.shape)}")
    if e2m1.fits_triton(weight):
        return quantize_by_triton(weight, amax.cpu(), arithmetic, block_amax)
    scaling = _Scaling.of(amax.to(weight.device), arithmetic, weight.dtype)
    if block_amax is None and e2m1.fits_loops(weight):
        codes, scale_bytes = e2m1.quantize_by_tables(weight, BLOCK, _tables(scaling.key))
        return NVFP4Weight(codes, scale_bytes.view(torch.float8_e4m3fn), scaling.divisor)
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in _row_chunks(rows, columns, weight.device):
        blocks = weight[part].reshape(part.stop - part.start, columns // BLOCK, BLOCK)
        largest = blocks.abs().amax(-1)
        if not largest.isfinite().all():
            raise ValueError(e2m1.NOT_FINITE)
        if block_amax is not None:
            scale = _static_scale(block_amax[part].to(weight.device), amax.to(weight.device).reshape(1))
        else:
            scale = scaling.block_scale(largest)
        packed[part] = e2m1.pack(e2m1.round_to_codes(blocks.float() / scaling.step(scale).unsqueeze(-1)).flatten(1))
        block_scale[part] = scale
    return NVFP4Weight(packed, block_scale, scaling.divisor)


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


@dataclass(frozen=True, slots=True)
class _Scaling:
    """How blocks are scaled in one fused group: `divisor` as stored, and ModelOpt's own factor, fp32 ``(1,)``."""

    arithmetic: Arithmetic
    divisor: Tensor
    factor_2: Tensor

    @classmethod
    def of(cls, amax: Tensor, arithmetic: Arithmetic, dtype: torch.dtype) -> "_Scaling":
        divisor = global_scale(amax, arithmetic=arithmetic, dtype=dtype)
        return cls(arithmetic, divisor, _scaling_factor_2(_one_element(amax)))

    @property
    def key(self) -> "_Key":
        return self.arithmetic, self.divisor.item(), self.factor_2.item()

    def block_scale(self, block_amax: Tensor) -> Tensor:
        """The E4M3 scale of blocks with this amax, given in the dtype of the weight."""
        if self.arithmetic == Arithmetic.MODELOPT:
            scale = block_amax.float() / (FP4_MAX * self.factor_2)
            return scale.masked_fill(scale == 0, 1.0).clamp(_FP8_TINY, FP8_MAX).to(torch.float8_e4m3fn)
        block_amax = block_amax.to(_rounding_dtype(block_amax.dtype))
        scale = (block_amax / torch.full_like(block_amax, FP4_MAX)).float() * self.divisor
        rounded = scale.clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        return rounded.masked_fill(rounded == 0, 0.125).to(torch.float8_e4m3fn)  # compressed-tensors' "eps" of E4M3

    def step(self, block_scale: Tensor) -> Tensor:
        """What a code of 1.0 stands for under a block scale, fp32."""
        if self.arithmetic == Arithmetic.MODELOPT:
            return block_scale.float() * self.factor_2
        return block_scale.float() / self.divisor


_Key = tuple[Arithmetic, float, float]


@lru_cache(maxsize=16)  # the members of a fused group, and the parts of a large weight, follow each other
def _tables(key: _Key) -> e2m1.Tables:
    """The arithmetic of a group on every bf16; the key is that of its `_Scaling`, because tensors are no keys."""
    arithmetic, divisor, factor_2 = key
    scaling = _Scaling(arithmetic, torch.tensor([divisor]), torch.tensor([factor_2]))
    every_scale = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return e2m1.Tables.of(scaling.block_scale(e2m1.magnitudes()).view(torch.uint8), scaling.step(every_scale))


def quantize_by_triton(weight: Tensor, amax: Tensor, arithmetic: Arithmetic, block_amax: Tensor | None) -> NVFP4Weight:
    """The scales of the group are made on the CPU; the GPU gets them as numbers and says if the weight is finite."""
    from export.kernels import e2m1_triton

    scaling = _Scaling.of(amax, arithmetic, weight.dtype)
    _, divisor, factor_2 = scaling.key
    codes, scales, bad = e2m1_triton.quantize_nvfp4(
        weight,
        modelopt=arithmetic == Arithmetic.MODELOPT,
        amax=amax.float().item(),
        divisor=divisor,
        factor_2=factor_2,
        block_amax=block_amax,
    )
    stored = torch.full((1,), divisor, device=weight.device)
    e2m1.check_finite(bad)
    return NVFP4Weight(codes, scales, stored)


def _largest(weight: Tensor) -> Tensor:
    if e2m1.fits_loops(weight):
        return e2m1.largest_magnitude(weight)
    return torch.stack(torch.aminmax(weight)).abs().max()


def _static_scale(block_amax: Tensor, amax: Tensor) -> Tensor:
    """The E4M3 scale from calibrated block amax ``[rows, in/16]``, in the order of operations of ModelOpt's
    ``get_weights_scaling_factor_from_quantizer``.
    """
    limit = torch.full_like(block_amax, FP4_MAX)
    scale = block_amax.float() / limit
    scale = torch.where(scale == 0, 1.0, scale) * FP8_MAX / (amax.float() / limit[:1, :1])
    return scale.clamp(_FP8_TINY, FP8_MAX).to(torch.float8_e4m3fn)


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
