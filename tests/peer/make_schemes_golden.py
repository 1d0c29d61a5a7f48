"""Writes tests/golden/schemes_llmcompressor.safetensors: what llm-compressor's ``model_free_ptq`` makes of one small
checkpoint, dense and MoE, with every scheme that needs no data.

It runs in llm-compressor's environment (``make golden``). The checkpoint is written once for each dtype, quantized by
the real entry point from safetensors to safetensors, and stored with the results.

    {dtype}/in/{name}     {dtype}/{preset}/{name}
"""

import torch
from make_nvfp4_golden import DTYPES, GOLDEN, adversarial_rows, quantize_with_peer, save_golden
from torch import Tensor

PRESETS = ("NVFP4A16", "MXFP4", "MXFP8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W8A8")
SAME_WITHOUT_INPUTS = {"MXFP4": "MXFP4A16", "MXFP8": "MXFP8A16"}
COLUMNS = 256


def hard_rows() -> Tensor:
    """``[18, 256]`` fp32: groups of zeros, of one sign, of one number, ties, tiny and huge values."""
    ramp = torch.linspace(-1.0, 1.0, COLUMNS)
    rows = [ramp, ramp.abs() + 0.1, -ramp.abs() - 0.1, ramp * 1e-30, ramp * 3e3, ramp.round(decimals=1)]
    rows += [torch.cat([ramp[:128] * 0.0, ramp[128:]])]
    return torch.cat([adversarial_rows().repeat(1, 4)[:11], torch.stack(rows)])


def make_checkpoint(dtype: torch.dtype) -> dict[str, Tensor]:
    """A dense layer and, for bf16, one with packed experts and a weight of more than one block of rows."""
    generator = torch.Generator().manual_seed(20261122)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    hard = hard_rows()
    tensors = {"model.layers.0.mlp.gate_proj.weight": weight(*hard.shape), "model.layers.0.mlp.up_proj.weight": hard}
    if dtype == torch.bfloat16:
        experts = weight(2, 16, COLUMNS)
        experts[:, ::8, 0] = 0.125  # gate and up agree on their maximum: in MoE the peer does not share global scales
        tensors["model.layers.1.mlp.experts.gate_up_proj"] = experts
        tensors["model.layers.1.mlp.experts.down_proj"] = weight(2, 136, 128)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def main() -> None:
    golden: dict[str, Tensor] = {}
    for label, dtype in DTYPES.items():
        tensors = make_checkpoint(dtype)
        golden |= {f"{label}/in/{name}": tensor for name, tensor in tensors.items()}
        for preset in PRESETS:
            quantized = quantize_with_peer(tensors, preset)
            golden |= {f"{label}/{preset}/{name}": tensor for name, tensor in quantized.items()}
            if preset in SAME_WITHOUT_INPUTS:
                others = quantize_with_peer(tensors, SAME_WITHOUT_INPUTS[preset])
                assert all(torch.equal(quantized[name], tensor) for name, tensor in others.items())
    save_golden(golden, GOLDEN.with_name("schemes_llmcompressor.safetensors"))


if __name__ == "__main__":
    main()
