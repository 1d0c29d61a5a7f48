"""Sources in the formats of other programs, made of plain weights on the spot, each with the weights that they mean.

The weights are computed here in fp32 with formulas of their own, so that they judge the readers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that lies in each place of a word


@dataclass(frozen=True, slots=True)
class Held:
    """A module as a source holds it.

    Args:
        tensors: by local name.
        weight: fp32 `[out, in]`: what they mean.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor


def blocks_of_fp8(weight: Tensor, *, name: str = "weight_scale_inv", e8m0: bool = False, side: int = 128) -> Held:
    """E4M3 codes in square blocks."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % side, 0, -rows % side))
    blocks = padded.unflatten(0, (-1, side)).unflatten(2, (-1, side))
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448
    if e8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    spread = scale.repeat_interleave(side, 0)[:rows].repeat_interleave(side, 1)[:, :columns]
    stored = scale.to(torch.float8_e8m0fnu) if e8m0 else scale
    return Held({"weight": codes.contiguous(), name: stored}, codes.float() * spread)


def fp8_per_tensor(weight: Tensor, *, name: str = "weight_scale", static: str | None = "input_scale") -> Held:
    """E4M3 codes under one number."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, name: scale.reshape(())}
    return Held(tensors | ({static: torch.tensor(0.013)} if static else {}), codes.float() * scale)


def fp8_per_row(weight: Tensor) -> Held:
    """E4M3 codes under a number for each row, as ModelOpt's FP8_PER_CHANNEL_PER_TOKEN."""
    scale = weight.float().abs().amax(1) / 448
    codes = (weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
    return Held({"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None])


def nvfp4(weight: Tensor, *, static: bool = True, factors: bool = False) -> Held:
    """ModelOpt's NVFP4; with `factors`, as after AWQ: the inputs are multiplied, so the weight means more."""
    rows, columns = weight.shape
    factor = torch.linspace(0.5, 2.0, columns).bfloat16() if factors else None
    stored = weight.float() if factor is None else weight.float() / factor.float()
    outer = torch.tensor(0.25 / 2688)  # one for all modules: ModelOpt shares it in fused groups
    blocks = stored.reshape(rows, -1, 16)
    scale = (blocks.abs().amax(-1) / 6 / outer).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    step = scale.float() * outer
    codes = (blocks / step.unsqueeze(-1)).unsqueeze(-1).sub(E2M1).abs().argmin(-1).to(torch.uint8).reshape(rows, -1)
    meant = (E2M1[codes.long()].reshape(rows, -1, 16) * step.unsqueeze(-1)).reshape(rows, columns)
    tensors = {
        "weight": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "weight_scale": scale,
        "weight_scale_2": outer,
        **({"input_scale": torch.tensor(0.002)} if static else {}),
        **({"pre_quant_scale": factor} if factor is not None else {}),
    }
    return Held(tensors, meant if factor is None else meant * factor.float())


def mxfp4(weight: Tensor, *, names: tuple[str, str] = ("weight", "weight_scale"), blocks: bool = False) -> Held:
    """MXFP4; with `blocks`, codes `[out, in/32, 16]` as GPT-OSS has them."""
    rows, columns = weight.shape
    parts = weight.float().reshape(rows, -1, 32)
    exponent = torch.ceil(torch.log2(parts.abs().amax(-1).clamp(min=2**-20) / 6))
    codes = (parts / torch.exp2(exponent).unsqueeze(-1)).unsqueeze(-1).sub(E2M1).abs().argmin(-1).to(torch.uint8)
    meant = (E2M1[codes.long()] * torch.exp2(exponent).unsqueeze(-1)).reshape(rows, columns)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    stored = packed if blocks else packed.reshape(rows, -1)
    return Held({names[0]: stored.contiguous(), names[1]: (exponent + 127).to(torch.uint8)}, meant)


def awq(weight: Tensor, *, group: int = 64, zero_point: bool = True) -> Held:
    """AutoAWQ's gemm."""
    codes, zero, scale = _grouped(weight, 4, group, zero_point)
    tensors = {"qweight": _awq_words(codes.T), "scales": scale.T.contiguous()}
    if zero_point:
        tensors["qzeros"] = _awq_words(zero.T)
    return Held(tensors, _meant(codes, zero, scale, group))


def gptq(weight: Tensor, *, bits: int = 4, group: int = 64, symmetric: bool = False, order: bool = False) -> Held:
    """GPTQ's first version, zero points less one; with `order`, columns of one group lie apart."""
    columns = weight.shape[1]
    index = torch.arange(columns) // group
    if order:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    sorted_columns = index.argsort(stable=True)
    codes, zero, scale = _grouped(weight[:, sorted_columns], bits, group, not symmetric)
    back = sorted_columns.argsort()
    codes, meant = codes[:, back], _meant(codes, zero, scale, group)[:, back]
    words = {"qweight": _words(codes, bits).T.contiguous(), "qzeros": _words((zero.T - 1) % (1 << bits), bits)}
    return Held({**words, "scales": scale.T.contiguous(), "g_idx": index.int()}, meant)


def int4_of_modelopt(weight: Tensor, *, group: int = 64, factors: bool = True) -> Held:
    """ModelOpt's INT4_AWQ: two rows a byte."""
    columns = weight.shape[1]
    factor = torch.linspace(0.5, 2.0, columns).bfloat16()
    stored = weight.float() / factor.float() if factors else weight.float()
    scale = (stored.unflatten(1, (-1, group)).abs().amax(-1) / 7).bfloat16()
    spread = scale.float().repeat_interleave(group, 1)
    codes = (stored / spread).round().clamp(-8, 7).to(torch.int8)
    nibbles = codes.view(torch.uint8) & 0xF
    tensors = {"weight": nibbles[0::2] | (nibbles[1::2] << 4), "weight_scale": scale}
    meant = codes.float() * spread
    return Held(
        tensors | ({"pre_quant_scale": factor} if factors else {}), meant * factor.float() if factors else meant
    )


def int8_of_modelopt(weight: Tensor) -> Held:
    """ModelOpt's INT8, a scale for each row."""
    scale = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
    return Held({"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None])


def _grouped(weight: Tensor, bits: int, group: int, zero_point: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 `[out, in]`, zero points and fp16 scales `[out, in/group]`."""
    top, parts = (1 << bits) - 1, weight.float().unflatten(1, (-1, group))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    if zero_point:
        scale = ((high - low) / top).half()
        zero = (-low / scale.float()).round().clamp(0, top)
    else:
        scale = (torch.maximum(-low, high) / (top // 2)).half()
        zero = torch.full_like(low, 1 << (bits - 1))
    codes = (parts / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
    return codes.clamp(0, top).int().flatten(1), zero.int(), scale


def _meant(codes: Tensor, zero: Tensor, scale: Tensor, group: int) -> Tensor:
    spread = [each.repeat_interleave(group, 1) for each in (zero, scale.float())]
    return (codes - spread[0]).float() * spread[1]


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 `[rows, columns]` in int32 words along the columns, one place after the other."""
    each = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // each, dtype=torch.int64)
    for place in range(each):
        words |= codes[:, place::each].long() << (bits * place)
    return words.to(torch.int32) if int(words.max()) < 1 << 31 else words.sub((words >> 31) << 32).to(torch.int32)


def _awq_words(codes: Tensor) -> Tensor:
    places = codes.unflatten(1, (-1, 8))[..., list(AWQ_PLACES)].flatten(1)
    return _words(places, 4)
