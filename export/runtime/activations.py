"""What engines do to the inputs of a layer: round them to codes and back, so that a plain matrix product follows.

Tensors are `[tokens, in]`. Arithmetic is that of `export.kernels`; scales are fp32, as in engines, whatever the inputs
are. `quantize_int8` gives the codes themselves, for an integer product.

NVFP4 divides the stored divisor out again (`2688 / global_scale` is the amax that made it) and rounds as ModelOpt's
fake quantizer did in training. A block so small that its scale rounds to zero becomes zero, as in engines: with
outliers among the inputs this is common. MX is compressed-tensors' arithmetic, which is what transformers computes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amaxbridge.export.kernels import e2m1, mx, nvfp4, scaled
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Blocks, Code, ScaledWeight
from amaxbridge.export.runtime.layer_parameters import data_of
from amaxbridge.export.schemes import scheme_of
from amaxbridge.export.schemes.scheme import static_scale
from amaxbridge.export.schemes.signature import Arguments, Signature, UnsupportedQuantizationError

_INT8_MAX = 127.0
_TINY_INT8 = 1e-10  # the least absmax of a token
_TINY_FP8 = 1.0 / (nvfp4.FP8_MAX * 512.0)  # the least scale of a token; vLLM's min_scaling_factor


@dataclass(frozen=True, slots=True)
class Activation:
    """How inputs are rounded; `scale` is the parameter that holds their static scale, if there is one."""

    round: Callable[[Tensor, Tensor], Tensor]
    scale: str | None = None

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`x` `[*, in]` rounded to codes and back, in its dtype."""
        scale = data_of(layer, self.scale) if self.scale else x
        return self.round(x.reshape(-1, x.shape[-1]), scale).reshape(x.shape)


def activation_for(signature: Signature) -> Activation | None:
    """How a layer rounds its inputs, None for not at all.

    Raises:
        UnsupportedQuantizationError: no engine computes these inputs beside these weights.
    """
    weights, inputs = signature.weights, signature.inputs
    if inputs is None:
        return None
    mx_or_fp8 = _mxfp8 if inputs.group_size == mx.BLOCK else _fp8(Blocks(width=inputs.group_size))
    known = {
        (4, "tensor_group", "local"): _nvfp4,
        (4, "group", True): _mxfp4,
        (8, "group", True): mx_or_fp8,
        (8, "token", True): _fp8(Blocks()),
        (8, "tensor", False): _static_fp8,
    }
    found = known.get((inputs.bits, inputs.strategy, inputs.dynamic))
    computed = scheme_of(signature) is not None or _goes_with(weights, inputs)
    if found is None or not inputs.symmetric or inputs.kind != "float" or not computed:
        raise UnsupportedQuantizationError(
            f"{signature}: these inputs are not supported beside these weights; supported: NVFP4 beside NVFP4 "
            f"(dynamic: local), MX beside MX in groups of {mx.BLOCK}, FP8 by tensor (static) or by token (dynamic) "
            "beside FP8, and in groups of 128 beside FP8 blocks"
        )
    scale = static_scale(inputs)
    return Activation(found, None if scale is None else scale.tensor)


def _goes_with(weights: Arguments, inputs: Arguments) -> bool:
    """True if engines compute such floats together, whether or not a scheme writes them."""
    if weights.bits != inputs.bits:
        return False
    if "group" in weights.strategy:
        return (weights.strategy, weights.group_size) == (inputs.strategy, inputs.group_size)
    if weights.strategy == "block":
        return inputs.strategy == "group" and weights.block_structure == (128, inputs.group_size)
    return inputs.strategy in ("token", "tensor")


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[tokens, in]` and scales fp32 `[tokens, 1]` of inputs, each token by itself.

    `absmax = max(|x|, 1e-10)`, `scale = absmax / 127`, `code = x * (127 / absmax)`, half away from zero: the per-token
    kernel of vLLM. Adding 0.5 and cutting off would round 0.49999997 up, so the fraction, which is exact, decides.
    """
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=_TINY_INT8)
    bound = torch.full_like(absmax, _INT8_MAX)
    scaled_up = x * (bound / absmax)
    whole = scaled_up.trunc()
    away = ((scaled_up - whole).abs() >= 0.5) * scaled_up.sign()
    return (whole + away).to(torch.int8), absmax / bound


def _nvfp4(x: Tensor, divisor: Tensor) -> Tensor:
    codes = nvfp4.quantize(x, torch.full_like(divisor, nvfp4.SCALE_RANGE) / divisor, arithmetic=Arithmetic.MODELOPT)
    rounded: Tensor = nvfp4.dequantize(codes, x.dtype).unflatten(-1, (-1, nvfp4.BLOCK))
    smallest = codes.block_scale.view(torch.uint8) == 1  # only among these are blocks whose own scale rounds to zero
    largest = x.unflatten(-1, (-1, nvfp4.BLOCK))[smallest].abs().amax(-1, keepdim=True).float()
    scale = (largest / torch.full_like(largest, nvfp4.FP4_MAX) * divisor).to(torch.float8_e4m3fn)
    rounded[smallest] = rounded[smallest].masked_fill(scale.float() == 0, 0.0)
    return rounded.flatten(-2)


def _mxfp4(x: Tensor, _: Tensor) -> Tensor:
    codes, exponents = mx.quantize_mxfp4(x, Arithmetic.COMPRESSED_TENSORS)
    return mx.dequantize(e2m1.unpack(codes), exponents, x.dtype)


def _mxfp8(x: Tensor, _: Tensor) -> Tensor:
    return mx.dequantize(*mx.quantize_mxfp8(x, Arithmetic.COMPRESSED_TENSORS), x.dtype)


def _fp8(blocks: Blocks) -> Callable[[Tensor, Tensor], Tensor]:
    def rounded(x: Tensor, _: Tensor) -> Tensor:
        amax = scaled.largest(x, blocks).float()
        return _through_e4m3(x, (amax / torch.full_like(amax, nvfp4.FP8_MAX)).clamp(min=_TINY_FP8), blocks)

    return rounded


def _static_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return _through_e4m3(x, scale.reshape(1, 1), Blocks(height=None))


def _through_e4m3(x: Tensor, scale: Tensor, blocks: Blocks) -> Tensor:
    codes = scaled.encode(x.float(), Code.E4M3, blocks, scale)  # in fp32: `encode` rounds in the dtype it is given
    return scaled.dequantize(ScaledWeight(codes, scale, None), blocks, x.dtype)
