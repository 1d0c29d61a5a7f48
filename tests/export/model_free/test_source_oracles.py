"""Quantized sources beside the programs that define them: their own checkpoints, and their own readers of ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter, FP8BlockDequantizer, ModelOptNvfp4Converter
from torch import Tensor

from amaxbridge.export import model_free_ptq
from amaxbridge.export.schemes import Groups, named_scheme
from tests.support import quantized_sources as held
from tests.support.checkpoints import DENSE, dense_model, tensors_of, write_checkpoint
from tests.support.in_memory import same

FORMATS: dict[str, tuple[Any, dict[str, Any], Any, Any]] = {
    "fp8_block": (
        held.blocks_of_fp8,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        FP8BlockDequantizer(targets=["re:.*_proj$"]),
        "nvfp4a16",
    ),
    "awq": (
        held.awq,
        {"quant_method": "awq", "bits": 4, "version": "gemm"},
        AutoAWQConverter(group_size=64),
        Groups.of(named_scheme("w4a16_asym", 64)),
    ),
    "modelopt": (
        held.nvfp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ModelOptNvfp4Converter(targets=["re:.*_proj$"]),
        "nvfp4",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_of_compressed_tensors_converters(name: str, tmp_path: Path) -> None:
    """Read by name or by its converter, a source becomes the same tensors: dequantized, and kept."""
    hold, declared, converter, scheme = FORMATS[name]
    stored = dict[str, Tensor]()
    for each, tensor in dense_model().items():
        module = each.removesuffix(".weight")
        tensors = hold(tensor).tensors if each.endswith("_proj.weight") else {"weight": tensor}
        stored |= {f"{module}.{local}": one for local, one in tensors.items()}
    source = write_checkpoint(tmp_path / "in", stored, config={**DENSE, "quantization_config": declared})
    named = model_free_ptq(source, tmp_path / "named", scheme, converter=name)
    theirs = model_free_ptq(source, tmp_path / "theirs", scheme, converter=converter)
    assert named.quantized == theirs.quantized
    assert len(named.quantized) == 14
    same(tensors_of(tmp_path / "named"), tensors_of(tmp_path / "theirs"))
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("named", "theirs")]
    assert configs[0] == configs[1]


MODELOPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import load_file

directory, name = sys.argv[1:]
sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 32}
torch.manual_seed(0)
config = Qwen3Config(architectures=["Qwen3ForCausalLM"], **sizes, **heads)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
mtq.quantize(model, getattr(mtq, name), lambda model: model(torch.arange(32)[None]))
export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=directory)
stored = load_file(f"{directory}/model.safetensors")
weights = {}
for name in [name for name in stored if name.endswith("weight_scale")]:
    module = name.removesuffix("_scale")
    codes, scale = stored[module], stored[name]
    if codes.dtype == torch.uint8:
        tensor = NVFP4QTensor((codes.shape[0], codes.shape[1] * 2), torch.float32, codes)
        outer = stored[f"{module}_scale_2"]
        weights[module] = tensor.dequantize(scale=scale, double_scale=outer, block_sizes={-1: 16}).bfloat16()
    else:
        weights[module] = FP8QTensor(codes.shape, torch.float32, codes).dequantize(scale=scale).bfloat16()
torch.save(weights, f"{directory}/fake.pt")
"""
"""Quantizes a model with ModelOpt and exports it; beside it, the weights as ModelOpt dequantizes them."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [("NVFP4_DEFAULT_CFG", "nvfp4"), ("FP8_DEFAULT_CFG", "fp8")])
def test_a_checkpoint_of_modelopt(name: str, scheme: str, tmp_path: Path) -> None:
    """Its own export: dequantized as it dequantizes, to the bit, and kept without loss."""
    source = tmp_path / "in"
    source.mkdir()
    subprocess.run([sys.executable, "-c", MODELOPT, source, name], check=True, capture_output=True)
    fake = torch.load(source / "fake.pt")
    (source / "fake.pt").unlink()
    report = model_free_ptq(source, tmp_path / "plain", "none")
    plain = tensors_of(tmp_path / "plain")
    assert len(fake) == 7
    assert report.formats == ("modelopt",)
    assert all(torch.equal(plain[each], weight) for each, weight in fake.items())
    kept = model_free_ptq(source, tmp_path / "out", scheme)
    assert len(kept.kept) == 7
    again = model_free_ptq(tmp_path / "out", tmp_path / "back", "none")
    assert again.formats == ("compressed_tensors",)
    for each, tensor in tensors_of(tmp_path / "back").items():  # FP8 of q, k and v is rounded to one scale
        alone = not each.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        )
        bound = 2**-7 if alone or scheme == "nvfp4" else 2**-4
        assert torch.allclose(tensor.float(), plain[each].float(), rtol=bound, atol=0 if alone else 1e-3), each
