"""DeepSeek-V3.2 and GLM-5.2: layers that share an indexer, and indexers that engines build in 16 bits."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import HFModel, read_hf_model
from amaxbridge.bridge.plan.tensor_specs import hf_tensors
from amaxbridge.bridge.stored.saved_arguments import disagreements
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import family_of
from tests.support.checkpoints import tensors_in
from tests.support.paths import PUBLISHED_MODELS
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS

FULL, SHARED = "full", "shared"


def described(directory: Path, fields: dict[str, Any]) -> HFModel:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return read_hf_model(directory)


def fields_of(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(TINY_MODELS[name].make().to_json_string(use_diff=False))
    return fields


def layers_with_an_indexer(names: Iterable[str]) -> list[int]:
    return sorted(int(name.split(".")[2]) for name in names if ".self_attn.indexer.wk." in name)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 1, 4, 6]),  # layer 6 is the MTP layer, which has one though layer 5 shares layer 4's
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [0, 2, 4, 6]),
        ({"index_topk_freq": 1}, [0, 1, 2, 3, 4, 5, 6]),
        ({"index_topk_freq": 8, "index_skip_topk_offset": 3, "num_nextn_predict_layers": 0}, [0, 1, 2]),
    ],
)
def test_which_layers_have_an_indexer(tmp_path: Path, changes: dict[str, Any], expected: list[int]) -> None:
    hf = described(tmp_path, {**fields_of("GLM-5.2"), "indexer_types": None, **changes})
    assert layers_with_an_indexer(hf_tensors(hf)) == expected


def test_the_indexers_of_glm_5_2_as_published() -> None:
    """22 of its 79 layers, the last of them for multi-token prediction."""
    fields = json.loads((PUBLISHED_MODELS / "GLM-5.2.json").read_text())
    found = layers_with_an_indexer(hf_tensors(HFModel(Path(), fields, fields, family_of(fields))))
    assert found == [0, 1, 2, *range(6, 78, 4), 78]


@pytest.mark.parametrize(
    "changes",
    [
        {"indexer_types": [FULL, SHARED, SHARED, FULL, FULL, SHARED]},
        {"index_topk_freq": None},  # engines would look for an indexer in each layer
        {"index_skip_topk_offset": 1},
        {"indexer_types": [FULL, FULL, SHARED, SHARED, FULL]},  # one layer short
        {"indexer_types": None, "index_skip_topk_offset": 0, "index_topk_freq": 2},  # the first layer has none to share
    ],
)
def test_layers_that_follow_no_schedule_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    hf = described(tmp_path, {**fields_of("GLM-5.2"), **changes})
    with pytest.raises(UsageError, match="indexer_types does not follow index_topk_freq"):
        hf.family.weight_settings(hf.config)


def test_deepseek_has_an_indexer_in_each_layer(tmp_path: Path) -> None:
    hf = described(tmp_path, {**fields_of("DeepSeek-V3.2"), "index_topk_freq": 4})
    with pytest.raises(UsageError, match="index_topk_freq=4 has weights that the mappings"):
        hf.family.weight_settings(hf.config)


def test_an_offset_counts_only_if_layers_share(tmp_path: Path) -> None:
    """Megatron's default of it is 0, transformers' 2: without sharing the two models are one."""
    alone = described(tmp_path / "alone", {**fields_of("GLM-5.2"), "indexer_types": None, "index_topk_freq": 1})
    assert "dsa_indexer_skip_topk_offset" not in alone.family.weight_settings(alone.config)
    sharing = described(tmp_path / "sharing", fields_of("GLM-5.2"))
    settings = sharing.family.weight_settings(sharing.config)
    assert (settings["dsa_indexer_topk_freq"], settings["dsa_indexer_skip_topk_offset"]) == (3, 2)


def test_saved_arguments_of_another_indexer(tmp_path: Path) -> None:
    hf = described(tmp_path, fields_of("GLM-5.2"))
    said = {"dsa_indexer_n_heads": 4, "dsa_indexer_head_dim": 32, "dsa_indexer_topk_freq": 1}
    assert list(disagreements(said, hf)) == [
        "--dsa-indexer-n-heads 4, but config.json gives 2",
        "--dsa-indexer-topk-freq 1, but config.json gives 3",
    ]


@pytest.mark.parametrize("name", ["DeepSeek-V3.2", "GLM-5.2"])
def test_an_indexer_stays_in_16_bits(name: str, tmp_path: Path) -> None:
    """vLLM runs wk and weights_proj as one unquantized layer, SGLang weights_proj alone."""
    hf = described(tmp_path / "hf", fields_of(name))
    checkpoint = write_state(tmp_path / "checkpoint", megatron_state(hf))
    AutoBridge(hf).convert_checkpoint(checkpoint, tmp_path / "out", scheme="nvfp4a16")
    written = tensors_in(tmp_path / "out")
    indexers = {name: tensor for name, tensor in written.items() if ".indexer." in name}
    assert len(indexers) == 5 * len(layers_with_an_indexer(written)) > 0
    assert not [name for name in indexers if not name.endswith((".weight", ".bias"))]
    assert "model.layers.1.self_attn.q_b_proj.weight_packed" in written
    for engine in ("vllm", "sglang"):
        assert verify(tmp_path / "out", engine=engine).ok
