"""Megatron-Core and ModelOpt on a machine without CUDA: for tests and the demo, never for a training run.

Both frameworks run on gloo and a CPU, except for seven calls:

- Megatron asks `torch.cuda.current_device` where to put rotary frequencies and gathered tensors; here the answer
  is the CPU device.
- Megatron moves embeddings that two pipeline stages share with `Tensor.cuda`; here that does nothing.
- Megatron makes the mask of a sliding window on the GPU; here it is made on the CPU.
- ModelOpt calls `torch.cuda.synchronize` before it packs a module's extra state; here that does nothing.
- ModelOpt's NVFP4 fake quantizer, `tensor_quant.dynamic_block_quantize_op`, has only a Triton and a CUDA kernel.
  `nvfp4_fake_quantize` below replaces it with the arithmetic of the Triton kernel, `fp4_fake_quant_block`. That is
  ModelOpt's `NVFP4QTensor` to the last bit, except for blocks so small that their scale rounds to zero: the kernel
  makes them zero, as engines do with inputs; `NVFP4QTensor`, which exporters use for weights, takes the smallest scale.
  ModelOpt's autograd function stays around it: gradients pass straight through.
- ModelOpt's NVFP4 quantizer with calibrated blocks calls the Triton kernels `static_blockwise_fp4_fake_quant` and,
  since 0.47, `fp4_cast_ste`; functions here compute the same, with gradients that pass straight through where nothing
  saturates.

`without_cuda` patches these calls while it lasts, and does nothing if CUDA is available. Megatron also needs
`TRANSFORMER_CONFIG_FOR_CPU`, since its fused kernels need CUDA. Transformer Engine layers remain impossible.
"""

import contextlib
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch

from amaxbridge.bridge.megatron.patches import Patch, patched

TRANSFORMER_CONFIG_FOR_CPU = MappingProxyType(
    {
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "deterministic_mode": True,  # gated delta nets in plain torch
    }
)
"""The `TransformerConfig` arguments that Megatron needs on a CPU."""

_NVFP4_BITS = (4, 2, 8, 4)  # e2m1 values with e4m3 block scales, as ModelOpt spells them: bits, exponent bits, twice
_E2M1_MAX = 6.0
_E4M3_MAX = 448.0
_LEAST_SCALE = 1e-5  # the kernel replaces smaller steps by 1.0, under which such values round to zero
_LEAST_GLOBAL_SCALE = 1e-12
_FP32_EXPONENT = 0x7F800000


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Inside, Megatron and ModelOpt run on a CPU. On a machine with CUDA nothing changes."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.fusions import fused_softmax
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    casts = hasattr(tensor_quantizer, "fp4_cast_ste")
    with patched(
        Patch(torch.cuda, "current_device", _current_device),  # Megatron uses the result as a device
        Patch(torch.cuda, "synchronize", _synchronize),
        Patch(torch.Tensor, "cuda", _stay),
        Patch(fused_softmax, "get_sliding_window_causal_mask", _sliding_window_mask),
        Patch(tensor_quant, "dynamic_block_quantize_op", _dynamic_block_quantize),
        Patch(tensor_quantizer, "static_blockwise_fp4_fake_quant", _static_block_quantize),
        *([Patch(tensor_quantizer, "fp4_cast_ste", _cast_straight_through)] if casts else []),
        why="No CUDA here: Megatron and ModelOpt run on the CPU. Meanwhile torch.cuda.current_device, "
        "torch.cuda.synchronize, Tensor.cuda and four functions of theirs are replaced",
    ):
        yield


def nvfp4_fake_quantize(values: torch.Tensor, amax: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """Rounds `values` `[..., in]` to NVFP4 and back, in their own dtype.

    `amax` is the quantizer's per-tensor amax, of any shape with one element. Computes what `fp4_fake_quant_block` does,
    but for the -0.0 of small negative values, which are +0.0 as in `NVFP4QTensor`.

    Raises ValueError if `in` is not a multiple of `block_size`.
    """
    if values.shape[-1] % block_size:
        raise ValueError(f"NVFP4 needs rows in blocks of {block_size}; got a tensor of shape {tuple(values.shape)}")
    blocks = values.unflatten(-1, (-1, block_size))
    global_scale = amax.float().reshape(()) / (_E2M1_MAX * _E4M3_MAX)
    global_scale = global_scale.masked_fill(global_scale <= 0, _LEAST_GLOBAL_SCALE)
    block_scale = blocks.abs().amax(dim=-1, keepdim=True).float() / (_E2M1_MAX * global_scale)
    scale = block_scale.clamp_(max=_E4M3_MAX).to(torch.float8_e4m3fn).float() * global_scale
    scale.masked_fill_(scale < _LEAST_SCALE, 1.0)

    quantized = _round_to_e2m1(blocks / scale)
    return quantized.mul_(scale).flatten(-2).to(values.dtype)


def _static_block_quantize(
    blocks: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor | None,
    quantize_block_scales: bool,
    *rest: Any,
) -> torch.Tensor:
    """ModelOpt's `static_blockwise_fp4_fake_quant`: rounds blocks `[n, 16]` under calibrated amax of `n` elements.

    Args:
        rest: the largest block scale, which ModelOpt 0.44 does not pass and takes for 448; the dtype to return; and
            if gradients pass, which they do for every caller.
    """
    *largest, dtype, _ = rest
    largest_scale = largest[0] if largest else _E4M3_MAX
    scale = amax.float().reshape(-1, 1) / _E2M1_MAX
    if quantize_block_scales:
        of_all = (amax.float().amax() if global_amax is None else global_amax.float()).reshape(())
        factor = _E4M3_MAX / (of_all * (_E4M3_MAX / largest_scale) / _E2M1_MAX)
        scale = (scale * factor).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float() * (1 / factor)
    zero = scale == 0
    rounded = _round_to_e2m1(blocks.detach().float() / scale.masked_fill(zero, 1.0)) * scale
    return _straight_through(blocks, rounded.masked_fill(zero, 0.0).to(dtype), blocks.new_ones(1))


def _cast_straight_through(scaled: torch.Tensor) -> torch.Tensor:
    """ModelOpt's `fp4_cast_ste`: rounds to E2M1; gradients pass where values do not saturate."""
    return _straight_through(scaled, _round_to_e2m1(scaled.detach().clone()), scaled.detach().abs() <= _E2M1_MAX)


def _straight_through(values: torch.Tensor, rounded: torch.Tensor, passes: torch.Tensor) -> torch.Tensor:
    """`rounded`, through which gradients reach `values` where `passes` is true."""
    made: torch.Tensor = _StraightThrough.apply(values, rounded, passes)
    return made


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rounded: torch.Tensor, passes: torch.Tensor) -> torch.Tensor:
        del values
        ctx.save_for_backward(passes)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return gradients[0] * passes, None, None


def _round_to_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """Rounds fp32 to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, half to even; in place.

    Between powers of two the steps are equal, so `round` suffices: steps of 0.5 up to 2, of 1 up to 4, then of 2.
    """
    scaled.clamp_(-_E2M1_MAX, _E2M1_MAX)
    power_of_two = (scaled.view(torch.int32) & _FP32_EXPONENT).view(torch.float32)
    step = power_of_two.clamp_(1.0, 4.0).mul_(0.5)
    return scaled.div_(step).round_().mul_(step).add_(0.0)  # -0.0 + 0.0 is 0.0


def _current_device() -> torch.device:
    return torch.device("cpu")


def _stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return tensor


def _sliding_window_mask(queries: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """The mask `[queries, keys]`, True where a key is hidden."""
    distance = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    return (distance < -window[0]) | (distance > window[1])


def _synchronize(device: Any = None) -> None:
    del device


def _dynamic_block_quantize(
    inputs: torch.Tensor,
    block_size: int,
    amax: torch.Tensor | None,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> torch.Tensor:
    """ModelOpt's `dynamic_block_quantize_op`, for NVFP4 with a calibrated amax only."""
    bits = (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits)
    if bits != _NVFP4_BITS or amax is None:
        raise NotImplementedError(
            f"on a CPU only NVFP4 with a calibrated amax can be fake-quantized, not bits {bits} with amax {amax}"
        )
    return nvfp4_fake_quantize(inputs, amax.amax(), block_size)
