"""Every family on real Megatron ranks: the logits of transformers, the weights there and back, the model's names."""

import re

import pytest
from conftest import Launcher
from parity import Case, run_parity
from tiny_models import TINY_MODELS

from bridge.hf_config import read_hf_model
from mappings.names import module_of

BUILDABLE = [name for name, tiny in TINY_MODELS.items() if not tiny.unbuildable]


@pytest.fixture(scope="module")
def cases(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return run_parity(launch, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("model", BUILDABLE)
def test_megatron_computes_what_transformers_computes(cases: list[Case], model: str) -> None:
    """fp32 on both sides, so what differs is the order of sums."""
    errors = {case.label: case.found["logits"]["relative"] for case in cases if case.model == model}
    assert len(errors) == len(TINY_MODELS[model].meshes)
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("model", BUILDABLE)
def test_weights_there_and_back(cases: list[Case], model: str) -> None:
    for case in cases:
        if case.model == model:
            assert case.same_weights, case.label


@pytest.mark.parametrize("model", BUILDABLE)
def test_the_names_of_a_live_model_are_those_that_the_registry_derives(cases: list[Case], model: str) -> None:
    """What `test_families.py` takes for the Megatron side of the published models."""
    for case in cases:
        if case.model == model:
            hf = read_hf_model(case.hf)
            found = [hf.registry.hf_to_megatron_lookup(name) for name in case.found["exported"]]
            derived = {mapping.megatron_param for mapping in found if mapping is not None}
            assert derived == set(case.found["names"]) - (
                {"output_layer.weight"} if hf.config["tie_word_embeddings"] else set[str]()
            )


@pytest.mark.parametrize("model", BUILDABLE)
def test_every_quantizer_has_the_names_of_its_weight(cases: list[Case], model: str) -> None:
    """ModelOpt quantizes every linear of the decoder, whatever class the model has for it, but for routers."""
    for case in cases:
        if case.model == model:
            registry = read_hf_model(case.hf).registry
            found = [registry.megatron_to_hf_lookup(f"{name}._amax") for name in case.found["quantizers"]]
            assert None not in found
            assert {module_of(target) for mapping in found if mapping for target in mapping.targets} == {
                f"{module_of(name)}.{kind}_quantizer"
                for name in case.found["exported"]
                if re.fullmatch(r"model\.layers\..*\.weight", name) and not re.search(r"norm|router|gate\.weight", name)
                for kind in ("weight", "input")
            }
