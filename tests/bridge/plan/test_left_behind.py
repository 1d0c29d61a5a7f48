"""Tensors of a directory that Megatron's model has no place for: none is dropped in silence."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.dry_run import plan_import
from amaxbridge.bridge.plan.mesh import Mesh
from amaxbridge.mappings.errors import CheckpointError
from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher, LiveRanks
from tests.support.paths import WORKERS
from tests.support.tiny_models import TINY_MODELS, save_tiny_model

LAYER = "model.layers.1"
LOST = {
    "a bias": f"{LAYER}.self_attn.q_proj.bias",
    "a bias of a norm": f"{LAYER}.input_layernorm.bias",
    "a layer behind the last": "model.layers.2.mlp.up_proj.weight",
    "another name": f"{LAYER}.mlp.fc.weight",
    "a head of another kind": "score.weight",
}
NO_LOSS = {
    "a buffer": f"{LAYER}.self_attn.rotary_emb.inv_freq",
    "a buffer of the model": "model.rotary_emb.inv_freq",
}


def with_tensors(source: Path, directory: Path, *names: str) -> Path:
    """A copy of a model in one file, with more tensors."""
    shutil.copytree(source, directory)
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    held = tensors_in(source)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    more = {name: torch.ones(64) for name in names}
    save_file({**held, **more}, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", LOST.values(), ids=LOST.keys())
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nvfp4"])
def test_refused_by_name(qwen3: Path, live: LiveRanks, tmp_path: Path, name: str, quantized: bool) -> None:
    source = live.at(tp=2) / "nvfp4" if quantized else qwen3
    directory = with_tensors(source, tmp_path / "hf", name)
    with pytest.raises(CheckpointError, match="no place for 1 tensors of ") as refusal:
        plan_import(read_hf_model(directory), Mesh())
    assert name in str(refusal.value) and "Correct config.json" in str(refusal.value)


@pytest.mark.parametrize("name", NO_LOSS.values(), ids=NO_LOSS.keys())
def test_what_no_model_reads(qwen3: Path, tmp_path: Path, name: str) -> None:
    plan_import(read_hf_model(with_tensors(qwen3, tmp_path / "hf", name)), Mesh())


def test_a_copy_of_the_embedding_as_tied_head(tmp_path: Path) -> None:
    save_tiny_model(TINY_MODELS["Qwen3, tied"], tmp_path / "tied")
    plan_import(read_hf_model(with_tensors(tmp_path / "tied", tmp_path / "hf", "lm_head.weight")), Mesh())


def test_mtp_layers_that_the_config_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny_model(TINY_MODELS["DeepSeek-V3"], tmp_path / "plain")
    directory = with_tensors(tmp_path / "plain", tmp_path / "hf", "model.layers.2.eh_proj.weight")
    with caplog.at_level(logging.WARNING, "amaxbridge"):
        plan_import(read_hf_model(directory), Mesh())
    assert "1 tensors of layers for multi-token prediction are left behind" in caplog.text


def test_the_same_of_a_live_model(launch: Launcher, qwen3: Path, tmp_path: Path) -> None:
    """At PP=2: no rank takes all tensors, and together they take all but one."""
    directory = with_tensors(qwen3, tmp_path / "hf", LOST["a bias"])
    step = {"sizes": {"tp": 1, "pp": 2}, "hf": str(directory), "import": str(tmp_path / "checkpoint")}
    with pytest.raises(AssertionError, match=r"no place for 1 tensors of .*\n.*q_proj\.bias"):
        launch(WORKERS / "live_import.py", json.dumps([step]), processes=2)
    assert not (tmp_path / "checkpoint").exists()
