"""quant_state.safetensors is read back as it was written; a file that does not fit is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from amaxbridge.export.amax.quant_state import Divergence, QuantState
from amaxbridge.export.amax.quant_state_file import ModelIdentity, plan_quant_state, quant_state_bytes, read_quant_state
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.tensors import TensorSpec

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_experts": 8
}  # fmt: skip
LAYER = "model.layers.0.self_attn"
STATE = QuantState(
    amax={
        f"{LAYER}.q_proj.weight_quantizer._amax": torch.rand(16, 4),
        f"{LAYER}.q_proj.weight_quantizer._global_amax": torch.tensor(0.7),
        f"{LAYER}.q_proj.input_quantizer._amax": torch.tensor(1.1),
    },
    formats={f"{LAYER}.q_proj": "nvfp4", f"{LAYER}.k_bmm_quantizer": "fp8"},
    missing=frozenset({f"{LAYER}.k_bmm_quantizer._amax"}),
    divergent={f"{LAYER}.q_proj.input_quantizer._amax": Divergence(0.9, 1.1)},
)
NAMES = ["model.embed_tokens.weight", f"{LAYER}.q_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "quant_state.safetensors"
    path.write_bytes(quant_state_bytes(STATE, ModelIdentity.of(CONFIG, NAMES)))
    return path


def test_what_is_written_is_read_back(file: Path) -> None:
    found = read_quant_state(file, CONFIG, NAMES)
    assert found.amax.keys() == STATE.amax.keys()
    assert all(torch.equal(found.amax[name], amax) for name, amax in STATE.amax.items())
    assert (found.formats, found.missing, found.divergent) == (STATE.formats, STATE.missing, STATE.divergent)
    assert isinstance(next(iter(found.divergent.values())), Divergence)


def test_others_read_it_as_safetensors(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(STATE.amax)
        model = json.loads(opened.metadata()["amaxbridge.quant_state"])["model"]
    assert (model["architectures"], model["layers"], model["hidden_size"], model["experts"]) == (
        ["Qwen3MoeForCausalLM"], 2, 64, 8
    )  # fmt: skip


def test_state_that_lies_on_several_ranks_is_planned_from_its_shapes(file: Path) -> None:
    """The same file, from the scalars that all ranks have and the shapes of the rest."""
    scalars = QuantState(
        {name: amax for name, amax in STATE.amax.items() if not amax.ndim},
        STATE.formats,
        STATE.missing,
        STATE.divergent,
    )
    specs = {name: TensorSpec.of(amax) for name, amax in STATE.amax.items() if amax.ndim}
    weights = {name: TensorSpec((16, 64), torch.bfloat16) for name in NAMES}
    shard = plan_quant_state(scalars, specs | weights, ModelIdentity.of(CONFIG, NAMES))
    assert file.read_bytes().startswith(shard.header)
    assert shard.nbytes == file.stat().st_size


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures: Qwen3MoeForCausalLM here, Qwen3ForCausalLM there"),
        ({"num_hidden_layers": 3}, "layers: 2 here, 3 there"),
        ({"hidden_size": 128}, "hidden_size: 64 here, 128 there"),
        ({"num_experts": 16}, "experts: 8 here, 16 there"),
    ],
)
def test_a_state_of_another_model_is_refused(file: Path, change: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=f"made for another model.*\n  {line}\n"):
        read_quant_state(file, CONFIG | change)


def test_other_modules_are_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint may have multi-token prediction layers that training did not calibrate."""
    read_quant_state(file, CONFIG, [*NAMES, "model.layers.2.eh_proj.weight"])
    assert "has other modules than the checkpoint" in caplog.text
    caplog.clear()
    packed = [name for name in NAMES if "experts" not in name] + ["model.layers.0.mlp.experts.gate_up_proj"]
    read_quant_state(file, CONFIG, packed)
    assert not caplog.text


def test_sizes_of_a_model_inside_another(file: Path) -> None:
    text = {key: value for key, value in CONFIG.items() if key != "architectures"}
    read_quant_state(file, {"architectures": CONFIG["architectures"], "text_config": text})
    with pytest.raises(UsageError, match="layers: 2 here, 9 there"):
        read_quant_state(file, {"text_config": {**text, "num_hidden_layers": 9}, **CONFIG, "architectures": []})


def test_no_such_file_and_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.safetensors: no such file.*quant_state=True"):
        read_quant_state(tmp_path / "none.safetensors", CONFIG)
    other = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1)}, other)
    with pytest.raises(UsageError, match="holds no quantizer state"):
        read_quant_state(other, CONFIG)
    text = tmp_path / "text"
    text.write_text("no tensors in here")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_quant_state(text, CONFIG)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("{", CheckpointError, "the metadata is damaged"),
        ("{}", CheckpointError, "the metadata is damaged"),
        ('{"version": 2}', UsageError, "format version 2"),
    ],
)
def test_metadata_of_another_kind(tmp_path: Path, content: str, kind: type[Exception], message: str) -> None:
    file = tmp_path / "state.safetensors"
    save_file({"w": torch.ones(1)}, file, metadata={"amaxbridge.quant_state": content})
    with pytest.raises(kind, match=message):
        read_quant_state(file, CONFIG)


def test_it_is_no_file_of_weights(file: Path) -> None:
    """quant_state.safetensors beside one file of weights does not make a checkpoint of two files without an index."""
    save_file({"w": torch.ones(1)}, file.parent / "model.safetensors")
    with SafetensorsCheckpoint(file.parent) as checkpoint:
        assert set(checkpoint.tensors) == {"w"}
