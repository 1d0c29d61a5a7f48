"""A part of the sweep, and proof that its oracles see what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.sweep.architectures import MODULES, PUBLISHED, rows
from tests.sweep.judge_row import NOT_LOADED, RIGHT, WRONG, Case, judge

pytestmark = pytest.mark.slow

# Model type → the verdict on fp8_dynamic.
TYPES = {
    "llama": RIGHT,  # a plain decoder
    "gemma2": RIGHT,  # tied by the default of its class
    "qwen3_moe": RIGHT,  # merged and split experts, square ones
    "deepseek_v32": RIGHT,  # indexers
    "llama4_text": RIGHT,  # experts with inputs first
    "granitemoe": NOT_LOADED,  # experts under other names
    "qwen3_vl_moe": NOT_LOADED,  # published with inputs first; a tower
    "gpt_oss": NOT_LOADED,  # interleaved experts with biases
    "llava": RIGHT,  # files spelled otherwise than modules
    "bamba": RIGHT,  # a hybrid
    "t5": RIGHT,  # shared embeddings, an encoder
}

Tensors = dict[str, torch.Tensor]
E0, E1 = "model.layers.0.mlp.experts.0.", "model.layers.0.mlp.experts.1."


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_in_every_layout(model_type: str) -> None:
    (row,) = rows([model_type])
    verdicts = judge(row, schemes=("fp8_dynamic",))
    assert verdicts[0]["layout"] == PUBLISHED
    assert {each["verdict"] for each in verdicts} == {TYPES[model_type]}, verdicts


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, Path]:
    """A case, its source with packed experts, and its quantized directory, which is right."""
    from amaxbridge import model_free_ptq

    directory = tmp_path_factory.mktemp("sweep")
    (row,) = rows(["qwen3_moe"])
    case = Case(row)
    case.save(directory / "source", MODULES)
    model_free_ptq(directory / "source", directory / "right", "fp8_dynamic")
    verdict, why, share = case.judge(directory / "source", directory / "right", "fp8_dynamic")
    assert (verdict, why, share) == (RIGHT, [], 1.0)
    return case, directory / "source", directory / "right"


def _exchange(first: str, second: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(first)]:
            other = name.replace(first, second)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def _transpose(tensors: Tensors, config: dict[str, Any]) -> None:
    weight = tensors[f"{E0}up_proj.weight"]
    tensors[f"{E0}up_proj.weight"] = weight.t().contiguous()
    tensors[f"{E0}up_proj.weight_scale"] = tensors[f"{E0}up_proj.weight_scale"][:1].repeat(weight.shape[1], 1)


def _scale(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight_scale"] *= 1.2


def _norm(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.norm.weight"] *= 1.01


def _lose(tensors: Tensors, config: dict[str, Any]) -> None:
    del tensors["model.layers.0.self_attn.q_norm.weight"]


def _invent(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight_of_nothing"] = torch.randn(3).bfloat16()


def _quantize_router(tensors: Tensors, config: dict[str, Any]) -> None:
    weight = tensors["model.layers.0.mlp.gate.weight"].float()
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors["model.layers.0.mlp.gate.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.gate.weight_scale"] = scale.bfloat16()


def _head_in_targets(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].remove("lm_head")


def _linear_in_ignore(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append("model.layers.0.self_attn.q_proj")


BREAKS: dict[str, Callable[[Tensors, dict[str, Any]], None]] = {
    "expert under another's number": _exchange(E0, E1),
    "gate, up and down exchanged": _exchange(f"{E0}gate_proj", f"{E0}up_proj"),
    "weight of another module": _exchange("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
    "rows are no rows of the model (wrong axis)": _transpose,
    "wrong values": _scale,
    "unquantized tensor changed": _norm,
    "source tensor lost": _lose,
    "tensor that the source does not have": _invent,
    "raw quantized": _quantize_router,
    "head targeted in transformers' tree, and unquantized": _head_in_targets,
    "quantized, and not targeted in transformers' tree": _linear_in_ignore,
}


@pytest.mark.parametrize("fault", BREAKS)
def test_the_oracles_see_a_fault(qwen3_moe: tuple[Case, Path, Path], tmp_path: Path, fault: str) -> None:
    case, source, right = qwen3_moe
    broken = tmp_path / "broken"
    shutil.copytree(right, broken)
    tensors, config = load_file(broken / "model.safetensors"), json.loads((broken / "config.json").read_text())
    BREAKS[fault](tensors, config)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text(json.dumps(config))
    verdict, why, _ = case.judge(source, broken, "fp8_dynamic")
    assert verdict == WRONG
    assert [line for line in why if line.startswith(f"{fault} (")], why
