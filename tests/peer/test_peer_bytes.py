"""Whole checkpoints, ours against llm-compressor's `model_free_ptq`, byte for byte: `make test-peer`.

Made on the spot, dense and with experts, one by one and packed, fused groups cut across files.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amaxbridge.export.model_free.whole_directory import model_free_ptq
from tests.support.checkpoints import DENSE, MOE, cuts_inside_groups, dense_model, moe_model, write_checkpoint

PEER = os.environ.get("PEER", ".venv-llmcompressor/bin/python")
PRESETS = ("NVFP4A16", "MXFP4A16", "MXFP8A16", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W8A8")
UNTOUCHED = ["lm_head", "re:.*embed_tokens$", "re:.*mlp\\.gate$"]  # by us without being told
MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "dense": (DENSE, dense_model),
    "moe": (MOE, lambda: moe_model(packed=False)),
    "packed": (MOE, lambda: moe_model(packed=True)),
}


@pytest.fixture(scope="module", params=MODELS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and what the peer made of it, a directory for each preset."""
    directory = tmp_path_factory.mktemp(request.param)
    config, model = MODELS[request.param]
    tensors = model()
    write_checkpoint(directory / "in", tensors, config=config, cuts=cuts_inside_groups(tensors))
    jobs = {preset: (str(directory / preset), UNTOUCHED) for preset in PRESETS}
    script = Path(__file__).with_name("run_peer.py")
    subprocess.run([PEER, script, directory / "in", json.dumps(jobs)], check=True, capture_output=True)
    return directory / "in", directory


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("workers", [1, 3])
def test_bytes(quantized: tuple[Path, Path], tmp_path: Path, preset: str, workers: int) -> None:
    source, theirs = quantized
    model_free_ptq(source, tmp_path / "out", preset, max_workers=workers)
    found, expected = tensors(tmp_path / "out"), tensors(theirs / preset)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
