"""Python files of a model directory are neither run nor asked about: an architecture that is known needs none."""

import json
import shutil
from pathlib import Path

import pytest

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import expected_tensors, read_hf_model
from amaxbridge.mappings.errors import UnknownArchitectureError
from tests.support.checkpoints import tensors_in

pytestmark = pytest.mark.slow
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit('remote code ran')\n"


@pytest.fixture
def kimi(deepseek_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As Kimi-K2 is published: a model type of its own, and code for it."""
    config = json.loads((deepseek_v3 / "config.json").read_bytes())
    classes = ("Config", "Model", "ModelForCausalLM")
    config |= {"model_type": "kimi_k2", "auto_map": {f"Auto{each}": f"remote.DeepseekV3{each}" for each in classes}}
    directory = tmp_path / "kimi"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "remote.py").write_text(CODE)
    for file in deepseek_v3.glob("*.safetensors*"):
        shutil.copy(file, directory)
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail(f"asked: {words}"))
    return directory


def test_a_model_type_with_code_is_read_by_its_architecture(kimi: Path, deepseek_v3: Path) -> None:
    found, plain = read_hf_model(kimi), read_hf_model(deepseek_v3)
    assert found.family is plain.family
    assert found.written["model_type"] == "kimi_k2"
    assert found.model_config == plain.model_config
    assert dict(found.file_tensors or {}).keys() == dict(plain.file_tensors or {}).keys() != set()
    assert expected_tensors(kimi) == expected_tensors(deepseek_v3)
    with AutoBridge(found).open_weights() as weights:
        names = weights.checkpoint.weight_map
        assert names.keys() == tensors_in(deepseek_v3).keys()
    assert not (kimi / "ran").exists()


def test_a_known_model_type_with_code_is_read_without_it(kimi: Path) -> None:
    config = json.loads((kimi / "config.json").read_bytes())
    (kimi / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
    assert read_hf_model(kimi).file_tensors
    assert not (kimi / "ran").exists()


def test_an_unknown_architecture_with_code_is_refused(kimi: Path) -> None:
    config = json.loads((kimi / "config.json").read_bytes())
    (kimi / "config.json").write_text(json.dumps({**config, "architectures": ["KimiNextForCausalLM"]}))
    with pytest.raises(UnknownArchitectureError):
        read_hf_model(kimi)
    assert expected_tensors(kimi) is None
    assert not (kimi / "ran").exists()
