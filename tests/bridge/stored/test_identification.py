"""A checkpoint and a config.json of different models; saved arguments that come from elsewhere."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.stored.identification import identify
from amaxbridge.bridge.stored.inert_pickle import Made, names_in
from amaxbridge.bridge.stored.saved_arguments import disagreements, read_arguments
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.mappings.errors import CheckpointError
from tests.support.launcher import LiveRanks


def changed_config(source: Path, directory: Path, **changes: Any) -> Path:
    """A directory with the source's config.json, but for some fields."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def test_all_disagreements_at_once(live: LiveRanks, tmp_path: Path) -> None:
    """Another width, fewer key-value heads, one more layer: a line for each kind of tensor, and nothing is written."""
    hf = changed_config(
        live.hf,
        tmp_path / "hf",
        intermediate_size=128,
        num_key_value_heads=1,
        num_hidden_layers=3,
        layer_types=["full_attention"] * 3,
    )
    with pytest.raises(CheckpointError) as error:
        AutoBridge.from_hf_pretrained(hf).convert_checkpoint(live.at(tp=2) / "checkpoint", tmp_path / "out")
    message = str(error.value)
    assert "Qwen3ForCausalLM" in message
    assert "decoder.layers.*.self_attention.linear_qkv.weight (2 of them): [256, 64]" in message
    assert "decoder.layers.*.mlp.linear_fc1.weight (2 of them): [192, 64] bfloat16, [256, 64] bfloat16 ex" in message
    assert "decoder.layers.2.mlp.linear_fc2.weight: missing, [64, 128] bfloat16 expected" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_more_layers_than_the_config_has(live: LiveRanks, tmp_path: Path) -> None:
    hf = changed_config(live.hf, tmp_path / "hf", num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(CheckpointError, match="which the model does not have"):
        AutoBridge.from_hf_pretrained(hf).convert_checkpoint(live.at(tp=2) / "checkpoint", tmp_path / "out")


def save_with(directory: Path, arguments: Any) -> DistCheckpoint:
    """A checkpoint with saved arguments, as Megatron-Core before 0.17 laid them out."""
    save({"decoder.final_layernorm.weight": torch.ones(4)}, storage_writer=FileSystemWriter(directory), no_dist=True)
    torch.save({"args": arguments, "iteration": 3}, directory / "common.pt")
    return DistCheckpoint(directory)


class TestSavedArguments:
    def test_they_are_compared(self, qwen3: Path, tmp_path: Path) -> None:
        checkpoint = save_with(
            tmp_path, Namespace(num_layers=2, hidden_size=96, swiglu=True, num_attention_heads=4, norm_epsilon=1e-5)
        )
        arguments = read_arguments(checkpoint)
        assert arguments is not None
        assert list(disagreements(arguments, read_hf_model(qwen3))) == [
            "--hidden-size 96, but config.json gives 64",
        ]

    def test_classes_are_not_imported_and_functions_not_called(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> object:
                return (os.system, (f"touch {tmp_path / 'run'}",))

        checkpoint = save_with(tmp_path, Namespace(num_layers=2, hook=Attack(), dtype=torch.bfloat16, file=Path("a")))
        arguments = read_arguments(checkpoint)
        assert arguments is not None
        assert isinstance(arguments["hook"], Made)
        assert list(names_in(arguments["hook"])) == ["posix.system"]
        assert (arguments["num_layers"], arguments["dtype"]) == (2, torch.bfloat16)
        assert not (tmp_path / "run").exists()

    def test_what_is_no_pickle_is_refused(self, tmp_path: Path) -> None:
        checkpoint = save_with(tmp_path, Namespace())
        (tmp_path / "common.pt").write_bytes(b"what is this")
        with pytest.raises(CheckpointError, match="saved arguments cannot be read"):
            read_arguments(checkpoint)


def test_a_checkpoint_says_what_it_is(live: LiveRanks, live_moe: LiveRanks) -> None:
    dense = identify(live.at(tp=2) / "checkpoint")
    assert "may be of Qwen3ForCausalLM" in dense
    assert "Qwen3MoeForCausalLM" in identify(live_moe.at(processes=2, tp=1, ep=2) / "checkpoint")


def test_a_checkpoint_of_no_family(tmp_path: Path) -> None:
    save({"strange.weight": torch.ones(4)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    assert "has the tensors of no family that is known" in identify(tmp_path)
