"""Quantizers of experts in a checkpoint, in every form that ModelOpt's versions and Megatron's experts give them."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.live.model_walk import Quantizer
from amaxbridge.bridge.plan.quantizer_gate import refusals
from amaxbridge.bridge.stored.stored_model import StoredModel
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.mappings.errors import CheckpointError

EXPERTS = "decoder.layers.0.mlp.experts.experts"
ALL_LAYERS = "decoder.layers.mlp.experts.experts"
CANONICAL = "decoder.layers.0.mlp.experts.linear_fc1"
STATIC = {"_disabled": False, "_num_bits": (2, 1), "_axis": None, "_block_sizes": {-1: 16}}
DISABLED = {"_disabled": True}


def state(settings: dict[str, Any]) -> io.BytesIO:
    """What ModelOpt serializes; a stream, because PyTorch would save a list of tensors as tensors."""
    stream = io.BytesIO()
    torch.save({"modelopt_quantizer_state": settings}, stream)
    return stream


def quantizers_in(directory: Path, saved: dict[str, Any], weights: str = EXPERTS) -> dict[str, Quantizer]:
    weight = {f"{weights}.{expert}.linear_fc1.weight": torch.ones(4, 16) for expert in range(4)}
    if weights == ALL_LAYERS:
        weight = {f"{weights}.linear_fc1.weight": torch.ones(1, 4, 4, 16)}
    save({**weight, **saved}, storage_writer=FileSystemWriter(directory), no_dist=True)
    return {each.name: each for each in StoredModel(DistCheckpoint(directory)).quantizers()}


def amax(quantizer: Quantizer) -> float:
    return float(quantizer.module._amax)


@pytest.mark.parametrize("local", [4, 2, 1])
def test_grouped_experts(tmp_path: Path, local: int) -> None:
    """The state of each expert is that of the whole grouped linear of its rank, which has `local` experts."""
    one = {"input_quantizer": STATIC, **{f"weight_quantizer.{n}": STATIC for n in range(local)}}
    saved: dict[str, Any] = {f"{EXPERTS}.linear_fc1.input_quantizer._amax": torch.tensor([9.0])}
    for expert in range(4):
        saved[f"{EXPERTS}.{expert}.linear_fc1._extra_state/shard_0_1"] = state({**one, "output_quantizer": DISABLED})
        saved[f"{EXPERTS}.{expert}.linear_fc1.weight_quantizer._amax"] = torch.tensor([expert + 1.0])
    found = quantizers_in(tmp_path, saved)
    assert {name: amax(each) for name, each in found.items()} == {
        f"{CANONICAL}.input_quantizer": 9.0,
        **{f"{CANONICAL}.weight_quantizer.{expert}": expert + 1.0 for expert in range(4)},
    }
    assert found[f"{CANONICAL}.input_quantizer"].experts == (0, 1, 2, 3)


def test_the_setting_of_an_expert_is_its_own(tmp_path: Path) -> None:
    """Two ranks hold two experts each; the setting changes on the second expert of its rank."""
    others = {"weight_quantizer.0": STATIC, "weight_quantizer.1": DISABLED}
    both = {"weight_quantizer.0": STATIC, "weight_quantizer.1": STATIC}
    saved: dict[str, Any] = {}
    for expert in range(4):
        saved[f"{EXPERTS}.{expert}.linear_fc1._extra_state/shard_0_1"] = state(both if expert < 2 else others)
    assert list(quantizers_in(tmp_path, saved)) == [f"{CANONICAL}.weight_quantizer.{expert}" for expert in range(3)]


def test_one_weight_quantizer_for_all(tmp_path: Path) -> None:
    """ModelOpt before 0.47 has one weight quantizer for all local experts."""
    shared = {"input_quantizer": STATIC, "weight_quantizer": STATIC}
    saved: dict[str, Any] = {
        f"{EXPERTS}.{expert}.linear_fc1._extra_state/shard_0_1": state(shared) for expert in range(4)
    }
    saved[f"{EXPERTS}.linear_fc1.input_quantizer._amax"] = torch.tensor([9.0])
    saved[f"{EXPERTS}.linear_fc1.weight_quantizer._amax"] = torch.tensor([5.0])
    found = quantizers_in(tmp_path, saved)
    assert {name: amax(each) for name, each in found.items()} == {
        f"{CANONICAL}.input_quantizer": 9.0,
        f"{CANONICAL}.weight_quantizer": 5.0,
    }
    assert found[f"{CANONICAL}.weight_quantizer"].experts == (0, 1, 2, 3)


def test_experts_that_are_a_module_each(tmp_path: Path) -> None:
    own = {"input_quantizer": STATIC, "weight_quantizer": STATIC}
    saved: dict[str, Any] = {}
    for expert in range(4):
        saved[f"{EXPERTS}.{expert}.linear_fc1._extra_state/shard_0_1"] = state(own)
        for number, quantizer in enumerate(own):
            saved[f"{EXPERTS}.{expert}.linear_fc1.{quantizer}._amax"] = torch.tensor([expert + 10.0 * number + 1])
    assert {name: amax(each) for name, each in quantizers_in(tmp_path, saved).items()} == {
        f"{CANONICAL}.{quantizer}.{expert}": expert + 10.0 * number + 1
        for expert in range(4)
        for number, quantizer in enumerate(own)
    }


def test_layers_and_experts_in_one_tensor(tmp_path: Path) -> None:
    """Without `singleton_local_shards`: the state's index counts layers and experts."""
    grouped = {"input_quantizer": STATIC, "weight_quantizer.0": STATIC, "weight_quantizer.1": STATIC}
    saved: dict[str, Any] = {
        f"{ALL_LAYERS}.linear_fc1._extra_state/shard_0.{expert}_1.4": state(grouped) for expert in range(4)
    }
    saved[f"{ALL_LAYERS}.linear_fc1.weight_quantizer._amax"] = torch.arange(1.0, 5.0)[None]
    saved[f"{ALL_LAYERS}.linear_fc1.input_quantizer._amax"] = torch.tensor([[9.0]])
    assert {name: amax(each) for name, each in quantizers_in(tmp_path, saved, ALL_LAYERS).items()} == {
        f"{CANONICAL}.input_quantizer": 9.0,
        **{f"{CANONICAL}.weight_quantizer.{expert}": expert + 1.0 for expert in range(4)},
    }


def test_a_chain_of_quantizers_is_not_taken_for_experts(tmp_path: Path) -> None:
    """Stages of W4A8 in experts that are a module each are named as the experts of a rank would be."""
    chain = {"weight_quantizer.0": STATIC, "weight_quantizer.1": STATIC}
    saved: dict[str, Any] = {}
    for expert in range(4):
        saved[f"{EXPERTS}.{expert}.linear_fc1._extra_state/shard_0_1"] = state(chain)
        for stage in range(2):
            saved[f"{EXPERTS}.{expert}.linear_fc1.weight_quantizer.{stage}._amax"] = torch.ones(1)
    found = quantizers_in(tmp_path, saved)
    assert list(found) == [
        f"{CANONICAL}.weight_quantizer.{expert}.{stage}" for expert in range(4) for stage in range(2)
    ]
    assert [each.value for each in refusals(found.values())] == ["SequentialQuantizer"] * 8


def test_experts_that_share_a_quantizer_and_disagree_about_it(tmp_path: Path) -> None:
    saved: dict[str, Any] = {f"{EXPERTS}.linear_fc1.input_quantizer._amax": torch.tensor([9.0])}
    for expert, setting in enumerate((STATIC, DISABLED, STATIC, STATIC)):
        own = {"input_quantizer": setting, "weight_quantizer.0": STATIC}
        saved[f"{EXPERTS}.{expert}.linear_fc1._extra_state/shard_0_1"] = state(own)
    with pytest.raises(CheckpointError, match=r"experts disagree .*\n.*linear_fc1\.input_quantizer"):
        quantizers_in(tmp_path, saved)


def test_blocks_of_grouped_experts_keep_their_own_shape(tmp_path: Path) -> None:
    """ModelOpt saves them as `[rows · blocks of a rank, ranks]`; weights here have one block of 16 in 4 rows."""
    saved: dict[str, Any] = {}
    for expert in range(4):
        saved[f"{EXPERTS}.{expert}.linear_fc2._extra_state/shard_0_1"] = state({"weight_quantizer.0": STATIC})
        saved[f"{EXPERTS}.{expert}.linear_fc2.weight"] = torch.ones(4, 64)
        saved[f"{EXPERTS}.{expert}.linear_fc2.weight_quantizer._amax"] = torch.arange(16.0).reshape(8, 2)
    quantizers_in(tmp_path, saved)
    stored = StoredModel(DistCheckpoint(tmp_path))
    amax = stored[f"{CANONICAL.replace('fc1', 'fc2')}.weight_quantizer.2._amax"]
    assert amax[1].tolist() == [4.0, 6.0, 5.0, 7.0]  # both blocks of the first rank, then those of the second
    assert stored.tensors[f"{CANONICAL.replace('fc1', 'fc2')}.weight_quantizer.2._amax"].spec.shape == (4, 4)


def test_a_buffer_that_modelopt_did_not_save_is_noticed(tmp_path: Path) -> None:
    metadata = {
        "params": {},
        "buffers": {"_amax": {"shape": torch.Size([])}, "_bias_value": {"shape": torch.Size([2])}},
    }
    saved: dict[str, Any] = {
        "decoder.layers.0.mlp.linear_fc2._extra_state/shard_0_1": state(
            {"weight_quantizer": {**STATIC, "_pytorch_state_metadata": metadata}}
        ),
        "decoder.layers.0.mlp.linear_fc2.weight_quantizer._amax": torch.tensor([3.0]),
    }
    (found,) = refusals(quantizers_in(tmp_path, saved).values())
    assert (found.attribute, found.value) == ("_bias_value", "not in the checkpoint")
