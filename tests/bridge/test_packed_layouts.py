"""Experts of a layer in one tensor: every layout that files have is read as the same experts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.tensor_specs import hf_tensors
from amaxbridge.mappings.errors import MappingError
from tests.support.tiny_models import TINY_MODELS, class_of, inputs_first

type Tensors = dict[str, Any]


def packed(tensors: Tensors) -> None:
    """Single experts into one tensor a layer, as Qwen3.5-MoE was published: outputs before inputs."""
    for name in [name for name in tensors if name.endswith(".experts.0.down_proj.weight")]:
        stem = name.removesuffix("0.down_proj.weight")
        experts = range(sum(other.startswith(stem) and other.endswith(".down_proj.weight") for other in tensors))
        gates, ups, downs = (
            [tensors.pop(f"{stem}{expert}.{part}_proj.weight") for expert in experts] for part in ("gate", "up", "down")
        )
        halves = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        tensors[f"{stem}gate_up_proj"], tensors[f"{stem}down_proj"] = torch.stack(halves), torch.stack(downs)


def as_written(tensors: Tensors) -> None:
    """The layout of transformers."""


LAYOUTS: dict[str, list[Callable[[Tensors], None]]] = {
    "Qwen3.5-MoE with images": [as_written, packed],
    "Qwen3-VL-MoE with images": [as_written, inputs_first],
}


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model, and its files as transformers writes them."""
    directory = tmp_path_factory.mktemp("written")
    torch.manual_seed(29)
    config = TINY_MODELS[request.param].make()
    class_of(config)(config).bfloat16().save_pretrained(directory)
    return request.param, directory


def laid_out(source: Path, directory: Path, layout: Callable[[Tensors], None]) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(source / "model.safetensors")
    layout(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_every_layout_holds_the_same_experts(written: tuple[str, Path], tmp_path: Path) -> None:
    """The oracle is transformers' model in memory."""
    model, source = written
    memory = dict(class_of(TINY_MODELS[model].make()).from_pretrained(source, dtype=torch.bfloat16).named_parameters())
    layer = "model.language_model.layers.0.mlp.experts"
    gate_up, down = (memory[f"{layer}.{name}"].detach() for name in ("gate_up_proj", "down_proj"))
    for number, layout in enumerate(LAYOUTS[model]):
        bridge = AutoBridge.from_hf_pretrained(laid_out(source, tmp_path / str(number), layout))
        with bridge.open_weights() as weights:
            for expert in (0, 5):
                gate, up = gate_up[expert].chunk(2)
                assert torch.equal(weights.read(f"{layer}.{expert}.gate_proj.weight"), gate), layout
                assert torch.equal(weights.read(f"{layer}.{expert}.up_proj.weight"), up), layout
                assert torch.equal(weights.read(f"{layer}.{expert}.down_proj.weight"), down[expert]), layout
    assert number == 1


def test_an_order_of_axes_that_sizes_do_not_tell_is_refused(tmp_path: Path) -> None:
    """Files of half the width would fit neither order; nothing is guessed."""
    config = TINY_MODELS["Qwen3-VL-MoE with images"].make()
    torch.manual_seed(29)
    class_of(config)(config).bfloat16().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name][:, :10, :10].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(MappingError, match="hold the inputs of experts as the second or the last dim"),
        AutoBridge.from_hf_pretrained(tmp_path).open_weights(),
    ):
        pass


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_models_config_says_if_the_head_is_tied(tied: bool, tmp_path: Path) -> None:
    """transformers reads no such field of the language model's part, whose default may be another."""
    config = TINY_MODELS["Qwen3-VL-MoE with images"].make()
    config.tie_word_embeddings, config.text_config.tie_word_embeddings = tied, not tied
    config.save_pretrained(tmp_path)
    hf = read_hf_model(tmp_path)
    assert hf.tied is tied
    assert ("lm_head.weight" in hf_tensors(hf)) is not tied
