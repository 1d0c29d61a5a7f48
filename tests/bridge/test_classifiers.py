"""Reward models, critics and classifiers: Megatron's values in transformers, from live models and from checkpoints."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from amaxbridge.bridge import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.families import CLASSIFIERS, FAMILIES
from amaxbridge.mappings.families.classifiers import SEQUENCES, TOKENS
from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher
from tests.support.paths import WORKERS
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS, save_tiny_model
from tests.workers.model import TOKENS as SHOWN

NEAR = 1e-5
"""Relative difference of values, in fp32."""


@dataclass(frozen=True)
class Case:
    """A head, as `tests/workers/live_classifiers.py` takes it."""

    model: str
    architecture: str
    labels: int
    bias: bool = False
    sharded: bool = False
    sizes: dict[str, int] = field(default_factory=lambda: {"tp": 2})

    @property
    def scores_tokens(self) -> bool:
        return self.architecture.endswith(TOKENS)


CASES = {
    "reward": Case("Qwen3, tied", "Qwen3ForSequenceClassification", 1),
    "critic": Case("Llama 2", "LlamaForTokenClassification", 1, bias=True),
    "classes": Case("Qwen2.5", "Qwen2ForSequenceClassification", 4, sharded=True),
    "capped logits": Case("Gemma 2", "Gemma2ForSequenceClassification", 3),
    "experts": Case("Qwen3-MoE", "Qwen3MoeForSequenceClassification", 5, sizes={"tp": 1, "ep": 2}),
}


@pytest.fixture(scope="module")
def made(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifiers")
    for case in CASES.values():
        if not (root / case.model).exists():
            save_tiny_model(TINY_MODELS[case.model], root / case.model)
    work = {name: asdict(case) | {"hf": str(root / case.model)} for name, case in CASES.items()}
    launch(WORKERS / "live_classifiers.py", json.dumps(work), root, processes=2)
    return root


def values_of(directory: Path, case: Case) -> torch.Tensor:
    """transformers' values of the tokens: of all, or of the last."""
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == [case.architecture]
    assert len(config["id2label"]) == case.labels
    kind = transformers.AutoModelForTokenClassification if case.scores_tokens else (
        transformers.AutoModelForSequenceClassification
    )  # fmt: skip
    model, loading = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == case.architecture
    assert not any(loading[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = [model.eval()(row[None]).logits for row in SHOWN]
    return torch.cat(found)


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_megatrons_values(name: str, made: Path) -> None:
    case, values = CASES[name], torch.load(made / name / "values.pt")
    expected = values["megatron"] if case.scores_tokens else values["megatron"][:, -1]
    found = values_of(made / name / "plain", case)
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < NEAR


@pytest.mark.parametrize("name", CASES)
def test_a_model_built_from_the_export_has_the_same_values(name: str, made: Path) -> None:
    values = torch.load(made / name / "values.pt")
    assert (values["again"] - values["megatron"]).norm() / values["megatron"].norm() < NEAR


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_becomes_the_live_export(name: str, made: Path, tmp_path: Path) -> None:
    case = CASES[name]
    bridge = AutoBridge.from_hf_pretrained(made / case.model, architecture=case.architecture, num_labels=case.labels)
    bridge.convert_checkpoint(made / name / "checkpoint", tmp_path / "out", scheme="none")
    assert {each.name: each.read_bytes() for each in (tmp_path / "out").glob("*.safetensors")} == {
        each.name: each.read_bytes() for each in (made / name / "plain").glob("*.safetensors")
    }


@pytest.mark.parametrize("name", CASES)
def test_saved_arguments_and_the_head_tell_the_architecture(name: str, made: Path, tmp_path: Path) -> None:
    case = CASES[name]
    bridge = AutoBridge.from_megatron_checkpoint(made / name / "checkpoint", architecture=case.architecture)
    bridge.convert_checkpoint(made / name / "checkpoint", tmp_path / "out", scheme="none")
    expected = tensors_in(made / name / "plain")
    assert tensors_in(tmp_path / "out").keys() == expected.keys()
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]) == case.labels


@pytest.mark.parametrize("name", CASES)
def test_the_body_is_quantized_and_the_head_is_not(name: str, made: Path) -> None:
    written, plain = tensors_in(made / name / "nvfp4"), tensors_in(made / name / "plain")
    config = json.loads((made / name / "nvfp4" / "config.json").read_text())["quantization_config"]
    assert "score" in config["ignore"]
    assert sum(key.endswith("weight_packed") for key in written) >= 7 * 2
    for key in (key for key in plain if key.startswith("score.")):
        assert written[key].equal(plain[key])
    report = verify(made / name / "nvfp4")
    assert report.ok, report


@pytest.mark.parametrize("name", CASES)
def test_a_language_models_config_names_what_to_give(name: str, made: Path, tmp_path: Path) -> None:
    case = CASES[name]
    with pytest.raises(CheckpointError, match=rf"a head \[{case.labels}, 64\]") as error:
        AutoBridge.from_hf_pretrained(made / case.model).convert_checkpoint(
            made / name / "checkpoint", tmp_path / "out", scheme="none"
        )
    assert str(error.value).endswith(f"architecture={case.architecture} num_labels={case.labels}")
    assert not (tmp_path / "out").exists()


def state_of(hf: Path, labels: int) -> dict[str, torch.Tensor]:
    """Megatron's tensors of a language model with a head in place of its output layer."""
    state = megatron_state(read_hf_model(hf))
    return state | {"output_layer.weight": torch.ones(labels, 64)}


WRONG = {
    "another number of labels": (3, {"architecture": "LlamaForSequenceClassification", "num_labels": 2}, r"\[2, 64\]"),
    "no bias": (1, {"architecture": "LlamaForTokenClassification", "num_labels": 1}, "output_layer.bias: missing"),
    "an output layer": (131, {"architecture": "LlamaForSequenceClassification", "num_labels": 1}, r"\[131, 64\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_head_that_is_not_the_architectures_is_refused(name: str, made: Path, tmp_path: Path) -> None:
    labels, options, message = WRONG[name]
    checkpoint = write_state(tmp_path / "checkpoint", state_of(made / "Llama 2", labels))
    bridge = AutoBridge.from_hf_pretrained(made / "Llama 2", **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        bridge.convert_checkpoint(checkpoint, tmp_path / "out", scheme="none")


OPTIONS = {
    "another family's": ({"architecture": "Qwen3ForSequenceClassification", "num_labels": 1}, "is no classifier of"),
    "no labels": ({"architecture": "LlamaForSequenceClassification"}, "needs num_labels="),
    "no architecture": ({"num_labels": 1}, "architecture=None is no classifier"),
    "a head of no rows": ({"architecture": "LlamaForSequenceClassification", "num_labels": 0}, "needs num_labels="),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_name_no_classifier_are_refused(name: str, made: Path) -> None:
    options, message = OPTIONS[name]
    with pytest.raises(UsageError, match=message):
        AutoBridge.from_hf_pretrained(made / "Llama 2", **options)  # type: ignore[arg-type]


def with_classes() -> Iterator[tuple[str, Any]]:
    for name, tiny in TINY_MODELS.items():
        named = tiny.make().architectures
        yield from ((name, family) for family in CLASSIFIERS if family.classifier_of in named)


def test_every_class_of_transformers_has_the_tensors_of_its_family(tmp_path: Path) -> None:
    seen = set[str]()
    for name, family in with_classes():
        (architecture,) = family.architectures
        directory = tmp_path / f"{name} {architecture}"
        TINY_MODELS[name].make().save_pretrained(directory)
        hf = read_hf_model(directory, architecture=architecture, num_labels=3)
        specs = MegatronSpecs(hf, hf.model_config)
        assert specs.shard("output_layer.weight", 2).shape == (3, 64)
        assert ("output_layer.bias" in specs.mappings) == architecture.endswith(TOKENS)
        seen.add(architecture)
        shutil.rmtree(directory)
    assert seen == {name for family in CLASSIFIERS for name in family.architectures}


def test_every_head_that_transformers_has_for_a_family_is_known() -> None:
    """Except where its class has a tower beside the language model, which Megatron's model has not."""
    with_towers = {"Qwen3_5", "Gemma3"}
    known = {name for family in CLASSIFIERS for name in family.architectures}
    stems = {
        name.removesuffix("ForCausalLM") for family in FAMILIES for name in family.architectures if "Causal" in name
    }
    expected = {
        stem + kind
        for stem in stems - with_towers
        for kind in (SEQUENCES, TOKENS)
        if hasattr(transformers, stem + kind)
    }
    assert known == expected | {"Gemma3TextForSequenceClassification"}
