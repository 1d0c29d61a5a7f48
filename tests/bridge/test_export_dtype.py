"""The dtype of an export: fp32 weights become what config.json says, and config.json says what was written."""

import json
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import HFModel, expected_tensors, read_hf_model
from amaxbridge.bridge.plan.casting import Casting
from amaxbridge.bridge.weight_dtypes import stated_dtype
from amaxbridge.mappings.errors import MappingError, UsageError
from amaxbridge.mappings.families import family_of
from tests.support.checkpoints import tensors_in
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS


class Case:
    """A checkpoint in one dtype, and a config.json that may say another."""

    def __init__(
        self, root: Path, held: torch.dtype, *, model: str = "Qwen3", largest: float = 1.0, **said: Any
    ) -> None:
        self.root = root
        fields = json.loads(TINY_MODELS[model].make().to_json_string(use_diff=False))
        fields = {name: value for name, value in fields.items() if name not in ("dtype", "torch_dtype")} | said
        (root / "hf").mkdir()
        (root / "hf" / "config.json").write_text(json.dumps(fields))
        state = megatron_state(read_hf_model(root / "hf"), held)
        state[next(name for name in state if name.startswith("decoder.final_"))][0] = largest
        self.state = state
        write_state(root / "checkpoint", state)

    def export(self, scheme: str = "none", **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        out = self.root / f"out{len(list(self.root.iterdir()))}"
        AutoBridge.from_hf_pretrained(self.root / "hf").convert_checkpoint(
            self.root / "checkpoint", out, scheme=scheme, **options
        )
        return tensors_in(out), json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_fp32_becomes_what_config_json_says(field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(tmp_path, torch.float32, **{field: "bfloat16"})
    with caplog.at_level(logging.WARNING, "amaxbridge"):
        tensors, config = case.export()
    assert "the weights are float32, but config.json says bfloat16" in caplog.text
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert config[field] == "bfloat16"
    assert torch.equal(tensors["model.norm.weight"], case.state["decoder.final_layernorm.weight"].bfloat16())


@pytest.mark.parametrize(("held", "said"), [("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")])
def test_nothing_else_is_cast_unasked(held: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(tmp_path, getattr(torch, held), dtype=said)
    with caplog.at_level(logging.WARNING, "amaxbridge"):
        tensors, config = case.export()
    assert f"the weights are {held}, but config.json says {said}: they stay {held}" in caplog.text
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, held)}
    assert config["dtype"] == held


@pytest.mark.parametrize("held", ["bfloat16", "float32"])
def test_a_config_json_that_says_nothing(held: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, config = Case(tmp_path, getattr(torch, held)).export()
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, held)}
    assert config["dtype"] == held
    assert "config.json says" not in caplog.text


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_a_dtype_that_was_asked_for(wanted: str, tmp_path: Path) -> None:
    for held in ("bfloat16", "float32"):
        (tmp_path / held).mkdir()
        tensors, config = Case(tmp_path / held, getattr(torch, held), torch_dtype="bfloat16").export(dtype=wanted)
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, wanted)}
        assert config["torch_dtype"] == wanted


@pytest.mark.parametrize("model", ["DeepSeek-V3", "GLM-4.5", "Nemotron-H"])
def test_biases_of_experts_stay_in_fp32(model: str, tmp_path: Path) -> None:
    tensors, _ = Case(tmp_path, torch.float32, model=model, dtype="bfloat16").export()
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept
    assert kept == {name for name in tensors if name.endswith("e_score_correction_bias")}


def test_a_scheme_sees_the_weights_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    single = Case(tmp_path / "a", torch.float32, dtype="bfloat16")
    tensors, _ = single.export("fp8_dynamic")
    half = Case(tmp_path / "b", torch.bfloat16, dtype="bfloat16")
    expected, _ = half.export("fp8_dynamic")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


UNKNOWN = ["bf16", "bflot16", "torch.bfloat16", "auto", "float8_e4m3fn", "float64", "nn", "", 16, {"": "bfloat16"}]


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("said", UNKNOWN, ids=repr)
def test_a_dtype_in_config_json_that_is_unknown(said: object, field: str, tmp_path: Path) -> None:
    """An unknown dtype was once ignored. transformers, which answers some with an AttributeError, is not asked."""
    hf = HFModel(tmp_path, {field: said}, {}, family_of({"architectures": ["Qwen3ForCausalLM"]}))
    message = re.escape(f"config.json says {field}={said}, which is no dtype of weights; known: bfloat16, float16,")
    with pytest.raises(UsageError, match=message):
        Casting.of(hf, {}, None)
    assert Casting.of(hf, {}, "float16").target == torch.float16


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, None),
        ({"dtype": None, "torch_dtype": None}, None),
        ({"dtype": "float32", "text_config": {"dtype": None}}, torch.float32),
        ({"dtype": "float32", "text_config": {"torch_dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bf16", "text_config": {"dtype": "float16"}}, torch.float16),
        ({"text_config": {"dtype": "bf16"}}, "config.json says text_config.dtype=bf16, which is no dtype"),
        ({"dtype": "bfloat16", "text_config": {"torch_dtype": "half"}}, "says text_config.torch_dtype=half, which"),
        (
            {"dtype": "bfloat16", "torch_dtype": "float16"},
            "says dtype=bfloat16 and torch_dtype=float16: correct it",
        ),
        (
            {"text_config": {"dtype": "float32", "torch_dtype": "float16"}},
            "config.json says text_config.dtype=float32 and text_config.torch_dtype=float16",
        ),
    ],
    ids=str,
)
def test_where_config_json_states_it(written: dict[str, Any], expected: torch.dtype | str | None) -> None:
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            stated_dtype(written, "text_config")
    else:
        assert stated_dtype(written, "text_config") == expected


@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("said", ["bflot16", "torch.bfloat16", "nn", "auto"])
def test_a_dtype_that_transformers_cannot_read(part: str, said: str, tmp_path: Path, transformers: ModuleType) -> None:
    fields = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    stated: dict[str, Any] = {part: {"torch_dtype": said}} if part else {"torch_dtype": said}
    (tmp_path / "config.json").write_text(json.dumps(fields | stated))
    for read in (read_hf_model, expected_tensors):
        with pytest.raises(UsageError, match=rf"config\.json: ({part}: )?torch_dtype={said} is no dtype; known: b"):
            read(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, torch.float32, largest=1e6, dtype="float16")
    with pytest.raises(MappingError, match=r"model.norm.weight has values up to 1e\+06, beyond float16: give dtype="):
        case.export()
    with pytest.raises(UsageError, match="unknown dtype=float8; known: bfloat16, float16, float32"):
        case.export(dtype="float8")
