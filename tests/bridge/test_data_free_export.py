"""A checkpoint without quantizers is quantized without data: the bytes that `quantize` makes of its plain export."""

import json
import logging
from pathlib import Path

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.schemes import SCHEMES, Groups, Recipe, SchemeGroup, named_scheme
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import tensors_in
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS

DATA_FREE = [name for name, scheme in SCHEMES.items() if not scheme.needs_input_amax]
DIVIDING = [name for name in DATA_FREE if name != "w4afp8"]  # its blocks are 128 wide, which the tiny models are not
MODELS = ["Qwen3", "Llama 3, tied", "Qwen1.5-MoE", "DeepSeek-V3", "GPT-OSS", "Nemotron-H", "Gemma 3"]


def recipe_of(name: str) -> Recipe:
    """A recipe of one scheme, with groups so small that they divide the tiny models' weights."""
    group_size = 32 if name in ("w4a16", "w4a16_asym", "w8a16") else None
    return Groups((SchemeGroup(named_scheme(name, group_size)),))


class Road:
    """A checkpoint of a tiny model without quantizers, its config.json, and its plain export."""

    def __init__(self, name: str, root: Path) -> None:
        self.hf, self.checkpoint, self.plain = root / "hf", root / "checkpoint", root / "plain"
        config = TINY_MODELS[name].make()
        for width in ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"):
            if hasattr(config, width):
                setattr(config, width, 64)  # which blocks of 32 divide
        config.save_pretrained(self.hf)
        write_state(self.checkpoint, megatron_state(read_hf_model(self.hf)))
        self.export(self.plain, "none")

    def export(self, output: Path, scheme: str | Recipe) -> None:
        AutoBridge.from_hf_pretrained(self.hf).convert_checkpoint(self.checkpoint, output, scheme=scheme)


@pytest.fixture(scope="module", params=MODELS)
def road(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Road:
    return Road(request.param, tmp_path_factory.mktemp("road"))


@pytest.mark.parametrize("scheme", DIVIDING)
def test_the_bytes_of_quantize(road: Road, scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "amaxbridge"):
        road.export(tmp_path / "once", recipe_of(scheme))
    assert f"the model has no quantizers: scheme={scheme} quantizes the weights alone" in caplog.text
    model_free_ptq(road.plain, tmp_path / "twice", recipe_of(scheme), device="cpu")
    once, twice = tensors_in(tmp_path / "once"), tensors_in(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for name, tensor in once.items():
        assert tensor.dtype == twice[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), twice[name].view(torch.uint8)), name
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("once", "twice")]
    for config in configs:  # modules come in the order of Megatron's names, or of the file's
        config["quantization_config"]["ignore"].sort()
    assert configs[0] == configs[1]
    facts = json.loads((tmp_path / "once" / "amaxbridge.json").read_text())
    assert facts["data_free"] is True
    assert facts["quantized"] > 0
    assert "| amax from training | none, quantized without data |" in (tmp_path / "once" / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8", "auto"])
def test_what_needs_input_amax_names_what_does_not(road: Road, scheme: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"scheme={scheme} needs quantizers, and the model has none") as error:
        road.export(tmp_path / "out", scheme)
    assert all(f"{name}" in str(error.value) for name in DATA_FREE)
    assert not list(tmp_path.iterdir())


def test_a_recipe_with_input_amax_is_refused(road: Road, tmp_path: Path) -> None:
    mixed = Groups((SchemeGroup(SCHEMES["fp8"], (r"re:.*q_proj",)), SchemeGroup(SCHEMES["nvfp4a16"])))
    with pytest.raises(UsageError, match=r"scheme=fp8\+nvfp4a16 needs quantizers"):
        road.export(tmp_path / "out", mixed)


def test_what_is_ignored_stays(road: Road, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(road.hf)
    report = bridge.convert_checkpoint(
        road.checkpoint, tmp_path / "out", scheme="fp8_dynamic", ignore=[r"re:.*\.(o_proj|out_proj)$"]
    )
    assert report.quantized
    assert not [module for module in report.quantized if module.endswith(("o_proj", "out_proj"))]
