"""examples/custom_model: a model that no family here has, trained in Megatron, exported and imported back."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.dry_run import plan_import, plan_on_mesh
from amaxbridge.bridge.plan.mesh import Mesh
from amaxbridge.mappings.errors import AmaxbridgeError, CheckpointError, UnmappedParameterError, UsageError
from amaxbridge.mappings.family_file import own_family
from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher
from tests.support.paths import ROOT, WORKERS
from tests.workers.model import TOKENS

EXAMPLE = ROOT / "examples" / "custom_model"
FAMILY = EXAMPLE / "my_llama.py"
NORM = 'ReplicatedMapping(f"{LAYER}.output_norm.weight", f"{HF_LAYER}.output_norm.weight"),'
LINE = 'ReplicatedMapping("decoder.layers.*.output_norm.weight", "model.layers.*.output_norm.weight"),'


@pytest.fixture(scope="module")
def trained(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF, with config.json alone; CKPT, trained on two ranks; and its exports NVFP4 and PLAIN."""
    root = tmp_path_factory.mktemp("custom")
    launch(EXAMPLE / "train.py", root / "HF", root / "CKPT", processes=2)
    for name, scheme in (("NVFP4", "nvfp4"), ("PLAIN", "none")):
        bridge = AutoBridge.from_hf_pretrained(root / "HF", family=FAMILY)
        bridge.convert_checkpoint(root / "CKPT", root / name, scheme=scheme)
    return root


@pytest.fixture
def modeling() -> Iterator[ModuleType]:
    """The example's model in transformers; registered as long as the test runs."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    spec = importlib.util.spec_from_file_location("modeling_my_llama", EXAMPLE / "modeling_my_llama.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del CONFIG_MAPPING._extra_content["my_llama"]
    del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[module.MyLlamaConfig]


@pytest.fixture
def without_norm(tmp_path: Path) -> Path:
    """The example's file without the line of the added norm."""
    file, text = tmp_path / "incomplete.py", FAMILY.read_text()
    assert NORM in text
    file.write_text(text.replace(NORM, ""))
    return file


def test_there_and_back(launch: Launcher, trained: Path, tmp_path: Path) -> None:
    """Codes, scales and amax are the same after an import at another mesh and a second export."""
    command = ROOT / "amaxbridge" / "__main__.py"
    launch(command, "import", f"hf={trained / 'NVFP4'}", f"output={tmp_path / 'BACK'}", f"family={FAMILY}")
    options = (f"hf={trained / 'HF'}", f"family={FAMILY}", "scheme=nvfp4")
    launch(command, "export", f"checkpoint={tmp_path / 'BACK'}", f"output={tmp_path / 'OUT'}", *options)
    first, second = tensors_in(trained / "NVFP4"), tensors_in(tmp_path / "OUT")
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    norms = [name for name in first if name.endswith("norm.weight")]
    assert len(norms) == 2 * 3 + 1
    assert "model.layers.1.feed_forward.gate_proj.weight_packed" in first


@pytest.mark.parametrize("processes", [1, 2])
def test_transformers_computes_what_megatron_computes(
    launch: Launcher, trained: Path, modeling: ModuleType, tmp_path: Path, processes: int
) -> None:
    launch(WORKERS / "live_custom_model.py", trained / "PLAIN", FAMILY, tmp_path / "logits.pt", processes=processes)
    model, loading = modeling.MyLlamaForCausalLM.from_pretrained(
        trained / "PLAIN", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        expected = model(TOKENS).logits
    result = torch.load(tmp_path / "logits.pt")
    assert result["refused"] == "MyLlamaForCausalLM cannot be built as a HybridModel"
    found = result["logits"][..., : expected.shape[-1]]
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_without_hf_the_arguments_describe_it(trained: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_megatron_checkpoint(trained / "CKPT", family=own_family(FAMILY))
    bridge.convert_checkpoint(trained / "CKPT", tmp_path / "OUT", scheme="nvfp4")
    assert tensors_in(tmp_path / "OUT").keys() == tensors_in(trained / "NVFP4").keys()
    assert json.loads((tmp_path / "OUT" / "config.json").read_text())["architectures"] == ["MyLlamaForCausalLM"]


def test_dry_runs(trained: Path, tmp_path: Path, modeling: ModuleType) -> None:
    """From the tensors of a directory, quantized or not; from the class that the file registers."""
    for name in ("NVFP4", "PLAIN", "HF"):
        hf = read_hf_model(trained / name, FAMILY)
        plan = plan_on_mesh(hf, Mesh.smallest(tp=2, pp=1, vpp=None, ep=1, etp=None), tmp_path / "OUT", scheme="nvfp4")
        assert len(plan.export.bundles) == len({each.key for each in plan.export.bundles}) > 10
    imported = plan_import(
        read_hf_model(trained / "NVFP4", FAMILY), Mesh.smallest(tp=1, pp=1, vpp=None, ep=1, etp=None)
    )
    assert imported.schemes == {"nvfp4": 14}


def test_a_config_alone_does_not_say_which_tensors_there_are(trained: Path, tmp_path: Path) -> None:
    hf = read_hf_model(trained / "HF", FAMILY)
    assert any("compared with nothing" in note for note in hf.notes)
    with pytest.raises(UsageError, match=r"nothing says which tensors MyLlamaForCausalLM has: .*my_llama\.py"):
        plan_on_mesh(hf, Mesh.smallest(tp=1, pp=1, vpp=None, ep=1, etp=None), tmp_path / "OUT", scheme="none")


@pytest.mark.parametrize("source", ["HF", "PLAIN"])
def test_another_size_is_refused(trained: Path, tmp_path: Path, source: str) -> None:
    """By the saved arguments, and by the weights of the directory."""
    config = json.loads((trained / "HF" / "config.json").read_text())
    (hf := tmp_path / "HF").mkdir()
    (hf / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    if source == "PLAIN":
        shutil.copy(trained / "PLAIN" / "model.safetensors", hf)
    bridge = AutoBridge.from_hf_pretrained(hf, family=FAMILY)
    with pytest.raises(CheckpointError, match=r"ffn-hidden-size 96, but config\.json gives 64"):
        bridge.convert_checkpoint(trained / "CKPT", tmp_path / "OUT", scheme="none")


def test_the_lines_that_are_missing(trained: Path, without_norm: Path, tmp_path: Path) -> None:
    """Named where nothing but the checkpoint says what there is, and where the directory has weights."""
    for source, kind in (("HF", UnmappedParameterError), ("PLAIN", UsageError), ("NVFP4", UsageError)):
        bridge = AutoBridge.from_hf_pretrained(trained / source, family=without_norm)
        with pytest.raises(kind) as caught:
            bridge.convert_checkpoint(trained / "CKPT", tmp_path / "OUT", scheme="none")
        assert f"add these lines to the mappings of {without_norm}" in str(caught.value)
        assert re.findall(r"^    (.+)$", str(caught.value), re.MULTILINE) == [LINE]


def test_the_line_works(trained: Path, without_norm: Path, tmp_path: Path) -> None:
    text = without_norm.read_text()
    without_norm.write_text(text.replace("        *decoder.HEAD,", f"        {LINE}\n        *decoder.HEAD,"))
    bridge = AutoBridge.from_hf_pretrained(trained / "HF", family=without_norm)
    bridge.convert_checkpoint(trained / "CKPT", tmp_path / "OUT", scheme="none")
    assert tensors_in(tmp_path / "OUT").keys() == tensors_in(trained / "PLAIN").keys()


def test_without_the_file_the_message_says_how(trained: Path) -> None:
    with pytest.raises(AmaxbridgeError, match=r"MyLlamaForCausalLM.*family=FILE\.py"):
        read_hf_model(trained / "HF")


def test_the_modules_beside_it_are_found_after_installed_packages() -> None:
    own_family(FAMILY)
    assert sys.path.index(str(EXAMPLE)) > min(map(sys.path.index, [p for p in sys.path if "site-packages" in p]))
