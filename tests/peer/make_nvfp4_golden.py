"""Writes tests/golden/nvfp4_llmcompressor.safetensors: the NVFP4 bytes of llm-compressor's ``model_free_ptq``.

It runs in llm-compressor's environment, not in ours, because the pins of torch and compressed-tensors differ
(``make golden``). A small dense checkpoint is made on the spot, once for each dtype, quantized by the real
entry point from safetensors to safetensors, and stored with its result, so that the tests need neither the
peer nor the generator. Of fp16, whose arithmetic overflows there, one weight is enough to note it.

    {dtype}/in/{name}.weight     {dtype}/out/{name}.weight_packed | weight_scale | weight_global_scale
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor import model_free_ptq
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "nvfp4_llmcompressor.safetensors"
OVERFLOWS = "model.layers.0.mlp.down_proj.weight"  # amax < 0.041
BLOCK = 16
COLUMNS = 64
ROWS = {"self_attn.q_proj": 16, "self_attn.k_proj": 8, "self_attn.v_proj": 8}
ROWS |= {"mlp.gate_proj": 12, "mlp.up_proj": 12, "mlp.down_proj": 16}
FACTORS: tuple[dict[str, float], ...] = (  # of the weights of each layer
    {"mlp.down_proj": 0.01},
    {},
    {
        "self_attn.q_proj": 0.1,
        "self_attn.k_proj": 300.0,
        "mlp.gate_proj": 0.0,
        "mlp.up_proj": 0.0,
        "mlp.down_proj": 1e-37,
    },
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def adversarial_rows() -> Tensor:
    """``[14, 64]`` fp32 whose maximum makes the global scale 2**10, so that ties are hit exactly."""
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties = torch.cat([bounds, -bounds, torch.tensor([6.0, -0.0])])  # one block, effective scale 1
    just_above, just_below = ties * (1 + 2**-7), ties * (1 - 2**-8)
    ramp = torch.arange(BLOCK) - 7.5
    rows = [
        torch.zeros(COLUMNS),
        -torch.zeros(COLUMNS),
        torch.cat([ties * 2.0**-k for k in range(2, 6)]),
        torch.cat([ties * 2.0**-k for k in range(6, 10)]),
        torch.cat([just_above * 2.0**-k for k in range(2, 6)]),
        torch.cat([just_below * 2.0**-k for k in range(2, 6)]),
        torch.cat([ramp * 2.0**-k for k in (5, 10, 15, 20)]),  # block scales down to zero, which become 0.125
        torch.cat([ramp * 2.0**-k for k in (60, 100, 126, 130)]),  # fp32 and bf16 subnormals at the end
        torch.full((COLUMNS,), 2.625),
        torch.full((COLUMNS,), -2.625),
        torch.linspace(-2.625, 2.625, COLUMNS),
        torch.cat([torch.full((1,), 2.625), torch.full((COLUMNS - 1,), 1e-6)]),
        torch.cat([torch.zeros(COLUMNS - 1), torch.full((1,), -1e-3)]),
        torch.cat([torch.full((BLOCK,), scale) for scale in (0.1, 0.01, 0.001, -0.0001)]),
    ]
    return torch.stack(rows)


def make_checkpoint(dtype: torch.dtype) -> dict[str, Tensor]:
    """Three dense layers: normal weights, adversarial rows, and uneven, zero and tiny groups."""
    generator = torch.Generator().manual_seed(20261122)
    tensors = {}
    for layer, std in enumerate((0.02, 0.5, 1.0)):
        for index, (name, rows) in enumerate(ROWS.items()):
            weight = torch.randn(rows, COLUMNS, generator=generator) * std * (1 + index)
            if layer == 1:
                hard = adversarial_rows()[:rows].roll(index, 0)
                weight = weight.clamp(-2.625, 2.625)
                weight[: len(hard)] = hard
            weight *= FACTORS[layer].get(name, 1.0)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight.to(dtype)
    return tensors


def quantize_with_peer(tensors: dict[str, Tensor], scheme: str = "NVFP4A16") -> dict[str, Tensor]:
    """Runs ``model_free_ptq`` from one checkpoint directory to another, on the CPU."""
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        source.mkdir()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        (source / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        model_free_ptq(source, target, scheme=scheme, device="cpu")
        quantized: dict[str, Tensor] = load_file(target / "model.safetensors")
        return quantized


def main() -> None:
    golden: dict[str, Tensor] = {}
    for label, dtype in DTYPES.items():
        tensors = make_checkpoint(dtype)
        if dtype == torch.float16:
            tensors = {OVERFLOWS: tensors[OVERFLOWS]}
        golden |= {f"{label}/in/{name}": tensor for name, tensor in tensors.items()}
        golden |= {f"{label}/out/{name}": tensor for name, tensor in quantize_with_peer(tensors).items()}
    save_golden(golden, GOLDEN)


def save_golden(golden: dict[str, Tensor], path: Path) -> None:
    """Writes a golden file that says what made it."""
    packages = ("llmcompressor", "compressed-tensors", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    path.parent.mkdir(exist_ok=True)
    save_file(golden, path, metadata={"made with": versions})  # one key: the order of several is not kept
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
