"""Faults that names and shapes alone reveal are reported before a byte is written."""

from pathlib import Path

import pytest
import torch

from amaxbridge.export import model_free_ptq
from amaxbridge.export.schemes import SCHEMES, Groups, Recipe, SchemeGroup
from amaxbridge.mappings.errors import AmaxbridgeError, MappingError, UsageError
from tests.support.checkpoints import DENSE, dense_model, tensors_in, write_checkpoint


def refused(tmp_path: Path, kind: type[AmaxbridgeError], message: str, scheme: str | Recipe) -> None:
    with pytest.raises(kind, match=message):
        model_free_ptq(tmp_path / "source", tmp_path / "out", scheme, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def targeting(*targets: str) -> Recipe:
    return Groups((SchemeGroup(SCHEMES["nvfp4a16"], targets),))


@pytest.mark.parametrize("shape", [(0, 256), (256, 0), (0, 0)])
@pytest.mark.parametrize("scheme", ["nvfp4a16", "fp8_dynamic", "w4a16", "fp8_block", "mxfp8"])
def test_empty_weights_are_not_quantized(tmp_path: Path, shape: tuple[int, int], scheme: str) -> None:
    tensors = {**dense_model(layers=1), "model.layers.0.mlp.up_proj.weight": torch.zeros(shape, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path / "source", tensors, config={"architectures": DENSE["architectures"]})
    refused(tmp_path, MappingError, r"1 weights to be quantized are empty:\n.*up_proj: \[\d+, \d+\]", scheme)


def test_empty_tensors_that_stay_are_copied(tmp_path: Path) -> None:
    tensors = {**dense_model(layers=1), "model.norm.weight": torch.zeros(0, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path / "source", tensors)
    model_free_ptq(tmp_path / "source", tmp_path / "out", "nvfp4a16", device="cpu")
    assert tensors_in(tmp_path / "out")["model.norm.weight"].shape == (0,)


def test_a_target_that_matches_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dense_model(layers=1))
    idle = targeting("re:.*_proj", "model.layers.7.mlp.up_proj", "re:model\\.layers\\.9\\..*")
    refused(tmp_path, UsageError, r"2 targets match no module:\n.*layers\.7.*\n.*layers", idle)


def test_an_embedding_as_a_target(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dense_model(layers=1))
    refused(tmp_path, UsageError, "1 targets are embeddings", targeting("re:.*_proj", "model.embed_tokens"))


def test_a_tied_head_as_a_target(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dense_model(layers=1), config={**DENSE, "tie_word_embeddings": True})
    refused(tmp_path, UsageError, "lm_head is tied to the embedding", targeting("re:.*_proj", "lm_head"))
