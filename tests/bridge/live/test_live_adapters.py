"""Adapters of live models on real ranks: at every mesh the bytes of PEFT's merge, and of the checkpoint's export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.mappings.errors import CheckpointError
from tests.support.adapters import ALPHA, adapters_for, merged_by_peft
from tests.support.checkpoints import tensors_in
from tests.support.comparing import label, same_tensors
from tests.support.launcher import Launcher
from tests.support.paths import WORKERS

KINDS = ("lora", "dora", "canonical", "modelopt")
MESHES: list[tuple[str, dict[str, int]]] = [
    ("qwen3", {"tp": 2}),
    ("qwen3", {"tp": 1, "pp": 2}),
    ("qwen3_moe", {"tp": 1, "ep": 2}),
    ("qwen3_moe", {"tp": 2}),
]


class Exports:
    """What the ranks of one mesh wrote."""

    def __init__(self, hf: Path, out: Path, sizes: dict[str, int]) -> None:
        self.hf, self.out, self.sizes = hf, out, sizes


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: f"{mesh[0]}-{label(mesh[1])}")
def exports(request: pytest.FixtureRequest, launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    name, sizes = request.param
    hf, out = request.getfixturevalue(name), tmp_path_factory.mktemp("adapters") / "out"
    launch(WORKERS / "live_adapters.py", hf, out, json.dumps(sizes), processes=2)
    return Exports(hf, out, sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_by_peft(exports: Exports, kind: str) -> None:
    plain, written = tensors_in(exports.hf), tensors_in(exports.out / kind)
    expected = merged_by_peft(plain, adapters_for(read_hf_model(exports.hf), kind))
    assert len(expected) >= 14
    for module, weight in expected.items():
        assert torch.equal(written[f"{module}.weight"], weight.bfloat16()), module
    for name in plain.keys() - {f"{module}.weight" for module in expected}:
        assert torch.equal(written[name], plain[name]), name


def test_streamed_to_an_engine(exports: Exports) -> None:
    streamed: dict[str, Any] = {}
    for rank in range(2):
        streamed |= torch.load(exports.out / f"streamed_{rank}.pt")
    written = tensors_in(exports.out / "lora")
    assert streamed.keys() == written.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in written.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["checkpoint", "legacy"])
def test_the_checkpoint_gives_the_same(exports: Exports, kind: str, form: str, tmp_path: Path) -> None:
    """As torch_dist, which the worker does not save of pipeline stages; and as legacy checkpoint, with `to_wrap`."""
    if "pp" in exports.sizes and form == "checkpoint":
        assert not (exports.out / f"{kind}_checkpoint").exists()
        return
    bridge, checkpoint = AutoBridge.from_hf_pretrained(exports.hf), exports.out / f"{kind}_{form}"
    how: Any = {"scheme": "none", "adapter": "merge"}
    if kind == "modelopt" and form == "checkpoint":
        with pytest.raises(CheckpointError, match=r"adapter.alpha=5 at rank 4 contradicts .*, where its scale is 1.5"):
            bridge.convert_checkpoint(checkpoint, tmp_path / "out", adapter_alpha=5.0, **how)
    else:
        how["adapter_alpha"] = ALPHA
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", **how)
    same_tensors(tmp_path / "out", exports.out / kind)


def test_quantized_in_one_go(exports: Exports, tmp_path: Path) -> None:
    """The bytes of the checkpoint's export; that these are those of merging first is a test of checkpoints."""
    if "pp" in exports.sizes:
        assert not (exports.out / "nvfp4").exists()
        return
    bridge = AutoBridge.from_hf_pretrained(exports.hf)
    how: Any = {"adapter": "merge", "adapter_alpha": ALPHA}
    bridge.convert_checkpoint(exports.out / "nvfp4_checkpoint", tmp_path / "out", **how)
    same_tensors(tmp_path / "out", exports.out / "nvfp4")
    divisors = {tensor.item() for name, tensor in tensors_in(tmp_path / "out").items() if "weight_global" in name}
    assert [*divisors] == [pytest.approx(2688 / 50)]


def test_weights_that_are_packed(exports: Exports) -> None:
    if "pp" in exports.sizes:
        assert not (exports.out / "packed_alone").exists()
        return
    for rank in range(2):
        message = (exports.out / f"packed_{rank}.txt").read_text()
        assert "linear_qkv.weight: has an adapter, and the merged weight has no codes yet" in message
    same_tensors(exports.out / "packed_alone", exports.out / "lora_alone")


@pytest.mark.parametrize("kind", ["lora", "dora", "canonical"])
def test_alone(exports: Exports, kind: str) -> None:
    if kind == "dora" and exports.hf.name == "qwen3_moe":
        messages = [(exports.out / f"{kind}_alone_{rank}.txt").read_text() for rank in range(2)]
        assert messages[0] == messages[1]
        assert "experts have no DoRA in PEFT" in messages[0]
        return
    tensors = tensors_in(exports.out / f"{kind}_alone")
    adapted = adapters_for(read_hf_model(exports.hf), kind)
    expected = {f"{module}.lora_A.weight": tensor for module, tensor in adapted.a.items()}
    expected |= {f"{module}.lora_B.weight": tensor for module, tensor in adapted.b.items()}
    expected |= {f"{module}.lora_magnitude_vector.weight": tensor for module, tensor in adapted.lengths.items()}
    assert tensors.keys() == {f"base_model.model.{name}" for name in expected}
    assert all(torch.equal(tensors[f"base_model.model.{name}"], tensor) for name, tensor in expected.items())
    config = json.loads((exports.out / f"{kind}_alone" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"{end}_proj" for end in ("down", "gate", "k", "o", "q", "up", "v")]


def test_refusals_are_those_of_every_rank(exports: Exports) -> None:
    first, second = (json.loads((exports.out / f"refusals_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert "adapter=merge writes the weights with them merged in" in first["default"]
    assert "has alpha 6, not adapter.alpha=77" in first["alpha"]
    assert "is disabled, so the model computes without it" in first["disabled"]
