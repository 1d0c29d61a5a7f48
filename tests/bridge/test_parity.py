"""Every family on real Megatron ranks: the logits of transformers, the weights there and back, the model's names."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.carried_tensors import carried_specs
from amaxbridge.export.disk.staging import Share
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.names import module_of
from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher
from tests.support.parity import Case, meshes_of_ranks, run_parity
from tests.support.tiny_models import TINY_MODELS, class_of
from tests.workers.model import TOKENS

TWO_FORMS = {"Qwen3.5-MoE"}  # in Megatron it is a Qwen3-Next
BUILDABLE = [name for name, tiny in TINY_MODELS.items() if not tiny.unbuildable]


@pytest.fixture(scope="module")
def cases(launch: Launcher, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[Case]:
    """Those of the models whose tests were selected, and the one with images."""
    selected = (getattr(item, "callspec", None) for item in request.session.items)
    models = {call.params["model"] for call in selected if call and isinstance(call.params.get("model"), str)}
    return run_parity(launch, tmp_path_factory.mktemp("parity"), {*models, "Gemma 3 with images"}, one_rank=False)


def of(cases: list[Case], model: str) -> list[Case]:
    """The cases of a model: one for each of its meshes."""
    found = [case for case in cases if case.model == model]
    assert len(found) == len(meshes_of_ranks(TINY_MODELS[model])) > 0
    return found


@pytest.mark.parametrize("model", BUILDABLE)
def test_megatron_computes_what_transformers_computes(cases: list[Case], model: str) -> None:
    """Both sides compute in fp32, so only the order of sums differs."""
    errors = {case.label: case.found["logits"]["relative"] for case in of(cases, model)}
    assert len(errors) == len(meshes_of_ranks(TINY_MODELS[model]))
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("model", BUILDABLE)
def test_weights_there_and_back(cases: list[Case], model: str) -> None:
    for case in of(cases, model):
        assert case.same_weights, case.label


@pytest.mark.parametrize("model", BUILDABLE)
def test_the_names_of_a_live_model_are_those_that_the_registry_derives(cases: list[Case], model: str) -> None:
    """`test_families.py` relies on these names for published models."""
    for case in of(cases, model):
        hf = read_hf_model(case.hf)
        found = [hf.registry.hf_to_megatron_lookup(name) for name in case.found["exported"]]
        derived = {mapping.megatron_param for mapping in found if mapping is not None}
        assert derived == set(case.found["names"]) - (
            {"output_layer.weight"} if hf.config["tie_word_embeddings"] else set[str]()
        )


def linears_in(names: list[str]) -> set[str]:
    """What ModelOpt quantizes: all linears but routers, the output layer and MTP layers, whatever their class is."""
    others = re.compile(r"norm|router|gate\.(wg\.)?weight|embed|head|conv1d|mtp|(?<!\.weight)$")
    return {module_of(name) for name in names if not others.search(name)}


@pytest.mark.parametrize("model", BUILDABLE)
def test_every_quantizer_has_the_names_of_its_weight(cases: list[Case], model: str) -> None:
    for case in of(cases, model):
        registry = read_hf_model(case.hf).registry
        found = [registry.megatron_to_hf_lookup(f"{name}._amax") for name in case.found["quantizers"]]
        assert None not in found
        assert {module_of(target) for mapping in found if mapping for target in mapping.targets} == {
            f"{module}.{kind}_quantizer"
            for module in linears_in(case.found["exported"])
            for kind in ("weight", "input")
        }


@pytest.mark.parametrize("model", BUILDABLE)
def test_quantized_experts_are_written_one_by_one(cases: list[Case], model: str) -> None:
    """All other linears keep their own names, whatever the layout of the family's plain files."""
    parts = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    for case in of(cases, model):
        names = case.found["exported"]
        quantized = linears_in(names)
        whole = {name for name in names if not (name.endswith(".weight") and module_of(name) in quantized)}
        expected = whole | {f"{module}.{part}" for module in quantized for part in parts}
        expected |= {name for name in tensors_in(case.hf) if name.startswith(read_hf_model(case.hf).family.carried)}
        assert tensors_in(case.back / "nvfp4").keys() == expected, case.label


@pytest.mark.parametrize("model", [model for model in BUILDABLE if "images" not in model])
def test_a_checkpoint_is_exported_from_its_arguments_alone(cases: list[Case], model: str, tmp_path: Path) -> None:
    """Without the Hugging Face directory, every mesh's files give the same bytes and the directory's logits."""
    for number, case in enumerate(of(cases, model)):
        out = tmp_path / str(number)
        family = read_hf_model(case.hf).family
        named = family.architectures[0] if family.alike or model in TWO_FORMS else None  # else another would be taken
        bridge = AutoBridge.from_megatron_checkpoint(case.checkpoint, architecture=named)
        bridge.convert_checkpoint(case.checkpoint, out, scheme="none")
        files = (directory / "model.safetensors" for directory in (case.back, out))
        assert len({file.read_bytes() for file in files}) == 1, case.label
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(TOKENS).logits
    expected = torch.load(case.hf / "logits.pt")
    assert (found - expected).norm() <= 1e-6 * expected.norm()


LANGUAGE_MODELS = "model.language_model", "language_model.model"
"""What transformers calls the decoder of a model with images."""
IMAGES = [model for model in BUILDABLE if "images" in model and TINY_MODELS[model].save is None]


@pytest.mark.parametrize("model", IMAGES)
def test_what_is_carried_over_is_not_quantized(cases: list[Case], model: str) -> None:
    """A vision tower is copied, and transformers loads it beside the quantized language model.

    transformers does not quantize experts that it packs in memory.
    """
    case = of(cases, model)[0]
    quantized, prefixes = case.back / "nvfp4", read_hf_model(case.hf).family.carried
    source, found = tensors_in(case.hf), tensors_in(quantized)
    carried = [name for name in source if name.startswith(prefixes)]
    assert carried and all(found[name].equal(source[name]) for name in carried)
    with AutoBridge.from_hf_pretrained(quantized).open_weights() as weights:
        assert set(weights.schemes) == {module_of(name) for name in found if name.endswith(".weight_packed")}
    if "MoE" in model:
        return
    loaded, loading = class_of(TINY_MODELS[model].make()).from_pretrained(quantized, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    schemes = {name for name, module in loaded.named_modules() if hasattr(module, "quantization_scheme")}
    assert schemes and all(name.partition(".layers.")[0] in LANGUAGE_MODELS for name in schemes)


def test_processes_that_never_talk_carry_over_once(cases: list[Case], tmp_path: Path) -> None:
    case = next(case for case in cases if "images" in case.model)
    bridge = AutoBridge.from_hf_pretrained(case.hf)
    for rank in (1, 0):
        assert not (tmp_path / "out").exists()
        bridge.convert_checkpoint(case.checkpoint, tmp_path / "out", scheme="none", share=Share(rank, 2))
    files = [directory / "model.safetensors" for directory in (case.back, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_carried_over_must_be_there(cases: list[Case], tmp_path: Path) -> None:
    case = next(case for case in cases if "images" in case.model)
    (tmp_path / "config.json").write_text((case.hf / "config.json").read_text())
    hf = read_hf_model(tmp_path)
    assert carried_specs(hf, required=False) == {}
    with pytest.raises(UsageError, match=r"no weights of vision_tower\., multi_modal_projector\. which Megatron lacks"):
        carried_specs(hf, required=True)


@pytest.mark.parametrize("model", ["Qwen2.5-VL with images"])
def test_newer_names_of_the_same_model_are_read(cases: list[Case], model: str, tmp_path: Path) -> None:
    """As transformers names its modules today: exported and imported as under the published names."""
    case = of(cases, model)[0]
    newer_names = {"visual.": "model.visual.", "model.": "model.language_model.", "lm_head.": "lm_head."}
    renamed = {
        newer_names[old] + name.removeprefix(old): tensor
        for name, tensor in tensors_in(case.hf).items()
        for old in newer_names
        if name.startswith(old)
    }
    (newer := tmp_path / "newer").mkdir()
    save_file(renamed, newer / "model.safetensors", metadata={"format": "pt"})
    (newer / "config.json").write_text((case.hf / "config.json").read_text())
    bridge = AutoBridge.from_hf_pretrained(newer)
    bridge.convert_checkpoint(case.checkpoint, tmp_path / "out", scheme="none")
    files = [directory / "model.safetensors" for directory in (case.back, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with bridge.hf.open_weights() as weights:
        assert set(weights.checkpoint.weight_map) == tensors_in(case.hf).keys()
    save_file(renamed | tensors_in(case.hf), newer / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="under both spellings"), bridge.hf.open_weights() as weights:
        assert weights.checkpoint.weight_map
