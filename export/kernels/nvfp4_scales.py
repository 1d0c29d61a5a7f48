"""The scales of NVFP4: the global scale of a fused group, made from its amax, and the scale of each block.

See `nvfp4` for the two arithmetics, and for why divisors are tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.export.kernels import e2m1
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.mappings.tensors import max_of

BLOCK = 16
"""Columns that share one block scale."""
FP4_MAX = 6.0
"""Largest E2M1 value."""
FP8_MAX = 448.0
"""Largest E4M3 value."""

SCALE_RANGE = FP4_MAX * FP8_MAX
"""What the amax of a fused group is divided by: the largest code under the largest block scale, 2688."""
FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale under a global scale in four-over-six: a block may then have 4 in place of 6 for its amax, under
a scale 1.5 times as large, without leaving E4M3."""
_LEAST_SCALE = 1e-8  # of a group, where block amax are learned
_FP8_TINY = 2.0**-9  # smallest positive (subnormal) E4M3 value
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of weights that can be quantized."""


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
        from amaxbridge.export.kernels import amax_triton

        amax = amax_triton.tensor_amax(weights)
    else:
        amax = max_of([_largest(weight).to(weights[0].device, torch.float32) for weight in weights])
    if arithmetic == Arithmetic.COMPRESSED_TENSORS:
        amax = amax.clamp(min=torch.finfo(torch.float32).tiny)
    return amax


def global_scale(amax: Tensor, *, arithmetic: Arithmetic, dtype: torch.dtype, largest: float = FP8_MAX) -> Tensor:
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
        largest: the largest block scale, in place of 448; for ``MODELOPT`` only.

    Raises:
        ValueError: ``amax`` has more than one element, or gives a divisor that is not finite and positive.
    """
    return global_scales(_one_element(amax), arithmetic=arithmetic, dtype=dtype, largest=largest)


def global_scales(amax: Tensor, *, arithmetic: Arithmetic, dtype: torch.dtype, largest: float = FP8_MAX) -> Tensor:
    """As `global_scale`, for several fused groups: fp32 `[n]` from `[n]`."""
    if arithmetic == Arithmetic.MODELOPT:
        return _checked_divisors(_scaling_factor_2(amax, largest).reciprocal(), amax)
    rounded = amax.to(_rounding_dtype(dtype))
    divisor = torch.nan_to_num(rounded.reciprocal() * SCALE_RANGE, nan=1.0, posinf=1.0, neginf=1.0)
    return _checked_divisors(divisor.float(), amax)


def input_global_scale(amax: Tensor) -> Tensor:
    """Return the stored divisor for activations: fp32 ``(1,)``, ``1 / (amax / 2688)``, rounded twice.

    ``amax / 2688`` is ``NVFP4QTensor.get_activation_scaling_factor``; compressed-tensors stores its inverse.
    ModelOpt's exporter replaces an amax of 0 or NaN by 6.0; that is a policy, so here it is an error.

    Raises:
        ValueError: ``amax`` has more than one element, or gives a divisor that is not finite and positive.
    """
    return input_global_scales(_one_element(amax))


def input_global_scales(amax: Tensor) -> Tensor:
    """As `input_global_scale`, for several fused groups: fp32 `[n]` from `[n]`."""
    return _checked_divisors(_scaling_factor_2(amax, FP8_MAX).reciprocal(), amax)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How the blocks of one fused group are scaled: `divisor` as stored, `factor_2` as in ModelOpt; fp32 ``(1,)``."""

    arithmetic: Arithmetic
    divisor: Tensor
    factor_2: Tensor

    @classmethod
    def of(cls, amax: Tensor, arithmetic: Arithmetic, dtype: torch.dtype, largest: float = FP8_MAX) -> "Scaling":
        return cls.of_groups(_one_element(amax), arithmetic, dtype, largest)

    @classmethod
    def of_groups(cls, amax: Tensor, arithmetic: Arithmetic, dtype: torch.dtype, largest: float = FP8_MAX) -> "Scaling":
        """Those of several groups with amax ``[n]``; all fields are ``(n,)`` then."""
        divisors = global_scales(amax, arithmetic=arithmetic, dtype=dtype, largest=largest)
        return cls(arithmetic, divisors, _scaling_factor_2(amax, largest))

    @property
    def key(self) -> tuple[Arithmetic, float, float]:
        return self.arithmetic, self.divisor.item(), self.factor_2.item()

    def block_scale(self, block_amax: Tensor) -> Tensor:
        """The E4M3 scale of blocks with this amax, which is given in the weight's dtype."""
        if self.arithmetic == Arithmetic.MODELOPT:
            scale = block_amax.float() / (FP4_MAX * self.factor_2)
            return scale.masked_fill(scale == 0, 1.0).clamp(_FP8_TINY, FP8_MAX).to(torch.float8_e4m3fn)
        block_amax = block_amax.to(_rounding_dtype(block_amax.dtype))
        scale = (block_amax / torch.full_like(block_amax, FP4_MAX)).float() * self.divisor
        rounded = scale.clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        return rounded.masked_fill(rounded == 0, 0.125).to(torch.float8_e4m3fn)  # compressed-tensors' "eps" of E4M3

    def step(self, block_scale: Tensor) -> Tensor:
        """The value of code 1.0 under a block scale, fp32."""
        if self.arithmetic == Arithmetic.MODELOPT:
            return block_scale.float() * self.factor_2
        return block_scale.float() / self.divisor


def _largest(weight: Tensor) -> Tensor:
    if e2m1.fits_loops(weight):
        return e2m1.largest_magnitude(weight)
    return torch.stack(torch.aminmax(weight)).abs().max()


def static_scale(block_amax: Tensor, amax: Tensor, largest: float = FP8_MAX) -> Tensor:
    """The E4M3 scale from calibrated block amax ``[rows, in/16]``.

    The operations have the order of ModelOpt's ``get_weights_scaling_factor_from_quantizer``.
    """
    limit = torch.full_like(block_amax, FP4_MAX)
    scale = block_amax.float() / limit
    scale = torch.where(scale == 0, 1.0, scale) * largest / (amax.float() / limit[:1, :1])
    return scale.clamp(_FP8_TINY, FP8_MAX).to(torch.float8_e4m3fn)


def learned_scale(block_amax: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """The E4M3 scale from learned block amax ``[rows, in/16]``, and the value of code 1.0 as training computed it.

    The operations have the order of ``StaticBlockScaleQuantizer._block_scale_from_amax``: a learned amax may be
    negative, or smaller than E4M3 can say under the group's scale. ModelOpt's ``448.0 / tensor`` is a reciprocal times
    448, which rounds twice, in Python and in its CUDA kernel alike.
    """
    six = torch.full_like(block_amax, FP4_MAX, dtype=torch.float32)
    of_group = (amax.float().reshape(1, 1) / six[:1, :1]).clamp(min=_LEAST_SCALE)
    scale = torch.maximum(block_amax.float() / six, _FP8_TINY * of_group)
    factor = of_group.reciprocal() * FP8_MAX
    stored = (scale * factor).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return stored, stored.float() * factor.reciprocal()


def unrounded_step(block_amax: Tensor) -> Tensor:
    """The value of code 1.0 from learned block amax ``[rows, in/16]`` whose scale is not rounded to E4M3."""
    return (block_amax.float() / torch.full_like(block_amax, FP4_MAX, dtype=torch.float32)).clamp(min=_LEAST_SCALE)


def _scaling_factor_2(amax: Tensor, largest: float) -> Tensor:
    amax = amax.float()
    return amax / torch.full_like(amax, FP4_MAX * largest)  # a tensor on the device: see the module's docstring


def _one_element(amax: Tensor) -> Tensor:
    if amax.numel() != 1:
        raise ValueError(f"NVFP4 needs one amax for a fused group; this one has shape {tuple(amax.shape)}")
    return amax.reshape(1)


def _checked_divisors(divisors: Tensor, amax: Tensor) -> Tensor:
    fits = (divisors > 0.0) & (divisors < float("inf"))
    if not bool(fits.all()):
        at = int(fits.logical_not().nonzero()[0])
        raise ValueError(f"NVFP4 amax {amax[at].item()} gives scale {divisors[at].item()}: not positive and finite")
    return divisors


def _rounding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that compressed-tensors rounds in; fp16 is replaced, see `global_scale`."""
    if dtype not in DTYPES:
        raise ValueError(f"NVFP4 quantizes bf16, fp16 and fp32 weights, not {dtype}")
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
