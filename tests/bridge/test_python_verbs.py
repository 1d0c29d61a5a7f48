"""What people who know Megatron-Bridge call, and what they are told when they call it wrong."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from amaxbridge import AutoBridge, model_free_ptq, verify
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.mappings.errors import OutputExistsError, UsageError
from tests.support.checkpoints import dense_model, tensors_in, write_checkpoint
from tests.support.launcher import Launcher

THERE_AND_BACK = """
import sys
import shutil
from pathlib import Path

from amaxbridge import AutoBridge
from amaxbridge.bridge import megatron
from amaxbridge.mappings.errors import UsageError

hf, out = Path(sys.argv[1]), Path(sys.argv[2])
report = AutoBridge.import_ckpt(hf, out / "checkpoint")  # opens a parallel state of its own
bridge = AutoBridge.from_hf_pretrained(hf)
print(bridge.export_ckpt(out / "checkpoint", out / "exported", scheme="none"))
with megatron.distributed(tp=1):
    (model,) = bridge.to_megatron_model()
    bridge.save_hf_weights(model, out / "saved")
    try:
        AutoBridge.import_ckpt(hf, out / "other", tp=1)
    except UsageError as error:
        print(error)
"""


def test_verbs_of_megatron_bridge(launch: Launcher, qwen3: Path, tmp_path: Path) -> None:
    """Into Megatron, as a checkpoint and as a model, and back: the same tensors."""
    script = tmp_path / "there_and_back.py"
    script.write_text(THERE_AND_BACK)
    printed = launch(script, qwen3, tmp_path)
    assert "Megatron's parallel state has its sizes: leave out tp=" in printed
    assert max(map(len, printed.splitlines())) < 300, "reports are short"
    source = tensors_in(qwen3)
    for name in ("exported", "saved"):
        written = tensors_in(tmp_path / name)
        assert written.keys() == source.keys()
        assert all(torch.equal(written[key], source[key]) for key in source), name


def test_what_is_supported(qwen3: Path, tmp_path: Path) -> None:
    supported = AutoBridge.list_supported_models()
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "DeepseekV3ForCausalLM"} <= set(supported)
    assert supported == sorted(set(supported)) and len(supported) > 40
    assert AutoBridge.can_handle(qwen3) is True
    unknown = write_checkpoint(tmp_path / "unknown", {}, config={"architectures": ["Nobody'sForCausalLM"]})
    assert AutoBridge.can_handle(unknown) is False
    with pytest.raises(UsageError, match="is not there"):
        AutoBridge.can_handle(tmp_path / "none")


def test_reprs_are_short(qwen3: Path, tmp_path: Path) -> None:
    assert repr(AutoBridge.from_hf_pretrained(qwen3)) == f"AutoBridge(Qwen3ForCausalLM, {qwen3})"
    report = model_free_ptq(qwen3, tmp_path / "out", "nvfp4a16")
    for each in (read_hf_model(qwen3), report):
        assert len(repr(each)) < 300, repr(each)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"overwrit": True}, "unknown argument overwrit=; did you mean overwrite=?"),
        ({"io.overwrite": True}, "unknown argument io.overwrite=; did you mean overwrite=?"),
        ({"overwrite": "yes"}, "overwrite='yes': give True or False, not str"),
        ({"ignore": "lm_head"}, "ignore='lm_head': give a list of names and patterns, not str"),
        ({"missing_amax": "guess"}, "unknown policy missing_amax=guess"),
        ({"base_model": "no name"}, "base_model=no name is no name of a model on the Hub"),
        ({"converter": "gguf"}, "gguf"),
    ],
)
def test_wrong_arguments_get_one_line(keywords: dict[str, Any], said: str, qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        model_free_ptq(qwen3, tmp_path / "out", "nvfp4a16", **keywords)
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_wrong_types_of_places(qwen3: Path, tmp_path: Path) -> None:
    for call in (
        lambda: model_free_ptq(3, tmp_path / "out", "fp8_dynamic"),  # type: ignore[arg-type]
        lambda: AutoBridge.from_hf_pretrained(None),  # type: ignore[arg-type]
        lambda: verify(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=r"is no path: give the name of a directory"):
            call()


def test_errors_speak_of_python_s_arguments(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", dense_model(1), config={"architectures": ["Qwen3ForCausalLM"]})
    model_free_ptq(source, tmp_path / "out", "fp8_dynamic")
    with pytest.raises(OutputExistsError, match=r"give overwrite=True$"):
        model_free_ptq(source, tmp_path / "out", "fp8_dynamic")


def test_import_says_what_it_rounds(launch: Launcher, qwen3: Path, tmp_path: Path) -> None:
    """Norms in fp32, as some files have them: in a model in bf16 they are rounded, in one in fp32 nothing is."""
    source = tmp_path / "hf"
    shutil.copytree(qwen3, source)
    tensors = tensors_in(qwen3)
    norms = [name for name in tensors if "norm" in name]
    save_file(tensors | {name: tensors[name].float() for name in norms}, source / "model.safetensors")
    script = tmp_path / "bring_in.py"
    script.write_text(
        "import sys\n"
        "from amaxbridge import AutoBridge\n"
        "for dtype in ('bfloat16', 'float32'):\n"
        "    report = AutoBridge.import_ckpt(sys.argv[1], sys.argv[2] + dtype, dtype=dtype)\n"
        "    print(dtype, len(report.rounded), set(report.rounded.values()) or '')\n"
    )
    printed = launch(script, source, tmp_path / "out")
    assert f"bfloat16 {len(norms)} {{'F32 to BF16'}}" in printed
    assert "float32 0" in printed
