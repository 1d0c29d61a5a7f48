"""A model whose linears have MXFP8 parameters, as a Blackwell GPU trains them, exported as they are. One GPU.

    PYTHONPATH=. python3 tests/gpu/te/mxfp8_one.py OUT

Only Blackwell quantizes to MXFP8, so Transformer Engine's tensors are put together here, of codes that the export could
not make of numbers. Each tensor of the export must have its codes and scales. Status 1 where one has not.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from make_one import save_random_model, twin_of
from models import build
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_engine.pytorch import DType
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer, MXFP8Tensor

from amaxbridge.bridge import AutoBridge, megatron

BLOCK = 32
CASE = replace(CASES["fp8_parameters_blockwise"], fp8=None, fp8_parameters=False)


def main(out: Path) -> None:
    with megatron.distributed(tp=1):
        save_random_model(CASE, out / "hf")
        bridge = AutoBridge.from_hf_pretrained(out / "hf")
        model = build(bridge.hf, CASE)
        put_mxfp8_parameters(model)
        for name, convert in (("codes", codes_of), ("exponents", exponents_of)):
            twin = twin_of(bridge, model, replace(CASE, fp32=True), convert)
            bridge.save_hf_pretrained(twin, out / name, scheme="none", overwrite=True)
        bridge.save_hf_pretrained(model, out / "mxfp8", scheme="auto", overwrite=True)
    codes, exponents, found = (load_file(out / name / "model.safetensors") for name in ("codes", "exponents", "mxfp8"))
    quantized = [name for name, numbers in exponents.items() if numbers.any()]
    wrong = [
        name
        for name in quantized
        if not torch.equal(found[name].view(torch.uint8), codes[name].to(torch.uint8))
        or not torch.equal(found[f"{name}_scale"], exponents[name][:, ::BLOCK].to(torch.uint8))
    ]
    print(f"MXFP8: {len(quantized) - len(wrong)} of {len(quantized)} tensors as they are; not: {wrong}")
    sys.exit(bool(wrong) or not quantized)


def put_mxfp8_parameters(model: nn.Module) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__module__.startswith("megatron.core.extensions") and weight is not None and weight.dim() == 2:
            module._parameters["weight"] = nn.Parameter(mxfp8_tensor(tuple(weight.shape), generator))


def mxfp8_tensor(shape: tuple[int, int], generator: torch.Generator) -> Any:
    """All bytes that are numbers, and scales as Transformer Engine lays them out: `[out, in/32]`, both padded."""
    rows, columns = shape
    codes = torch.randint(0, 255, shape, generator=generator, device="cuda", dtype=torch.uint8)
    codes[codes == 0x7F] = 0  # the NaN; the other one, 0xFF, is not drawn
    padded = (-(-rows // 128) * 128, -(-(columns // BLOCK) // 4) * 4)
    scales = torch.randint(110, 125, padded, generator=generator, device="cuda", dtype=torch.uint8)
    return MXFP8Tensor(
        shape=shape,
        dtype=torch.bfloat16,
        rowwise_data=codes,
        rowwise_scale_inv=scales,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=MXFP8Quantizer(DType.kFloat8E4M3),
        with_gemm_swizzled_scales=False,
        device=codes.device,
    )


def codes_of(parameter: Any) -> Tensor:
    """The codes as numbers, zeros for other parameters; see `make_one.codes_of`."""
    return parameter._rowwise_data.float() if isinstance(parameter, MXFP8Tensor) else torch.zeros_like(parameter)


def exponents_of(parameter: Any) -> Tensor:
    """The E8M0 scale of each element."""
    if not isinstance(parameter, MXFP8Tensor):
        return torch.zeros_like(parameter)
    rows, columns = parameter.shape
    return parameter._rowwise_scale_inv[:rows, : columns // BLOCK].float().repeat_interleave(BLOCK, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
