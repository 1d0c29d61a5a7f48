"""Sources that are quantized in part, with compressed-tensors' converters: ours against llm-compressor, byte for byte.

Only the shape of single numbers differs: engines' parameters have one dim, compressed-tensors' converter writes none.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter, FP8BlockDequantizer, ModelOptNvfp4Converter
from safetensors.torch import load_file
from torch import Tensor

from amaxbridge.export.model_free.whole_directory import model_free_ptq
from tests.support import quantized_sources as held
from tests.support.checkpoints import MOE, dense_model, moe_model, tensors_of, write_checkpoint

PEER = os.environ.get("PEER", ".venv-llmcompressor/bin/python")
UNTOUCHED = ["lm_head", "re:.*embed_tokens$", "re:.*mlp\\.gate$"]  # by us without being told
ATTENTION, MLP = r"re:.*self_attn\.[qkvo]_proj$", r"re:.*mlp\..*_proj$"
SOURCES: dict[str, tuple[Any, Any, str, str, Any]] = {
    "fp8_block": (
        lambda: moe_model(packed=True),
        held.blocks_of_fp8,
        "self_attn",
        "NVFP4A16",
        FP8BlockDequantizer(targets=[ATTENTION]),
    ),
    "modelopt": (dense_model, held.nvfp4, "mlp", "FP8_DYNAMIC", ModelOptNvfp4Converter(targets=[MLP])),
    "awq": (dense_model, held.awq, "self_attn", "FP8_DYNAMIC", AutoAWQConverter(group_size=64, targets=[ATTENTION])),
}


def test_bytes(tmp_path: Path) -> None:
    for name, (model, hold, part, _, _) in SOURCES.items():
        stored = dict[str, Tensor]()
        for each, tensor in model().items():
            module = each.removesuffix(".weight")
            is_held = each.endswith("_proj.weight") and part in each
            tensors = {f"{module}.{local}": one for local, one in hold(tensor).tensors.items()} if is_held else {}
            stored |= tensors or {each: tensor}
        write_checkpoint(tmp_path / name, stored, config=MOE)
    script = Path(__file__).with_name("run_peer_converters.py")
    subprocess.run([PEER, script, tmp_path, ATTENTION, MLP, *UNTOUCHED], check=True, capture_output=True)
    for name, (_, _, _, scheme, converter) in SOURCES.items():
        model_free_ptq(tmp_path / name, tmp_path / f"{name}_ours", scheme, converter=converter)
        found, files = tensors_of(tmp_path / f"{name}_ours"), (tmp_path / f"{name}_peer").glob("*.safetensors")
        expected = {each: tensor for file in files for each, tensor in load_file(file).items()}
        assert len(expected) > 40
        assert found.keys() == expected.keys()
        for each, tensor in expected.items():
            assert found[each].dtype == tensor.dtype, each
            assert torch.equal(found[each].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), each
