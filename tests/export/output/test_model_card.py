"""The small files of an output: what is carried over, and the card, whose metadata the Hub must take."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from amaxbridge.cli import command_line
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.report import write_report
from amaxbridge.mappings.errors import UsageError

README = """---
license: apache-2.0
license_link: https://example.org/license
language: [en, de]
tags: [chat]
base_model: owner/before
model-index:
- name: scores
---

# A model

Its terms, and how to prompt it.
"""
CARRIED = {
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"top_k": 20}',
    "modeling_own.py": "pass",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "assets/picture.svg": "<svg/>",
    "1_Pooling/config.json": "{}",
}
LEFT = {
    "hf_quant_config.json": "{}",
    "amaxbridge.json": "{}",
    "report.html": "",
    ".cache/huggingface/lock": "",
    "__pycache__/modeling_own.cpython-312.pyc": "",
    "original/consolidated.00.pth": "weights",
    "original/params.json": "{}",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with everything that a directory on the Hub may have, where its cache would put it."""
    directory = tmp_path / "models--owner--model" / "snapshots" / "0123abc"
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(
        {f"model.layers.{layer}.mlp.{name}.weight": torch.randn(32, 32).bfloat16() for layer in (0, 1)
         for name in ("gate_proj", "up_proj", "down_proj")} | {"lm_head.weight": torch.randn(32, 32).bfloat16()},
        directory / "model.safetensors",
    )  # fmt: skip
    for name, content in {
        **CARRIED,
        **LEFT,
        "config.json": '{"architectures": ["LlamaForCausalLM"]}',
        "README.md": README,
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


def card(directory: Path) -> tuple[dict[str, Any], str]:
    _, metadata, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_report_adds_what_it_measured(source: Path, tmp_path: Path) -> None:
    """Once or again, the rest of the card stays."""
    output = tmp_path / "out"
    model_free_ptq(source, output, "nvfp4a16")
    before = (output / "README.md").read_text()
    with pytest.raises(UsageError, match="card=True needs reference="):
        write_report(output, output=tmp_path / "report", card=True)
    for _ in range(2):
        write_report(output, reference=source, output=tmp_path / "report", card=True)
    after = (output / "README.md").read_text().splitlines()
    (added,) = set(after) - set(before.splitlines())
    assert re.fullmatch(
        r"\| signal to noise of the weights \| 2\d\.\d dB, the lowest 2\d\.\d dB in `model\..*` \|", added
    )
    after.remove(added)
    assert "\n".join(after) == before.rstrip("\n")
    (output / "amaxbridge.json").unlink()
    with pytest.raises(UsageError, match=r"no amaxbridge.json there"):
        write_report(output, reference=source, output=tmp_path / "report", card=True)


def test_companions(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_free_ptq(source, tmp_path / "out", "nvfp4a16")
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written == {*CARRIED, "README.md", "amaxbridge.json", "config.json", "model.safetensors"}
    for name, content in CARRIED.items():
        assert (tmp_path / "out" / name).read_text() == content, name
    assert "weights of their own are not carried over:\n  original" in caplog.text


def test_the_card_keeps_the_licence_and_says_what_is_new(source: Path, tmp_path: Path) -> None:
    model_free_ptq(source, tmp_path / "out", "nvfp4a16", record={"command_line": "amaxbridge quantize scheme=nvfp4a16"})
    metadata, text = card(tmp_path / "out")
    assert metadata == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "license_link": "https://example.org/license",
        "language": ["en", "de"],
        "base_model": "owner/model",
        "base_model_relation": "quantized",
        "tags": ["chat", "amaxbridge", "compressed-tensors", "nvfp4a16"],
    }
    facts = json.loads((tmp_path / "out" / "amaxbridge.json").read_text())
    weights, head = 6 * 32 * 32, 32 * 32 * 2
    before, after = 2 * weights + head, weights // 2 + weights // 16 + 6 * 4 + head
    assert facts["bytes"] == {"before": before, "after": after}
    assert (facts["quantized"], facts["ignored"], facts["base_model"]) == (6, ["lm_head"], "owner/model")
    assert f"{after / 1e3:.3g} kB, before {before / 1e3:.3g} kB ({after / before:.0%})" in text
    assert "amaxbridge quantize scheme=nvfp4a16" in text
    assert text.endswith("# A model\n\nIts terms, and how to prompt it.\n")
    assert str(tmp_path) not in text + json.dumps(facts)


def test_a_card_of_ours_is_replaced_not_nested(source: Path, tmp_path: Path) -> None:
    model_free_ptq(source, tmp_path / "plain", "none")
    metadata, text = card(tmp_path / "plain")
    assert metadata["base_model_relation"] == "finetune"
    assert "compressed-tensors" not in metadata["tags"]
    model_free_ptq(tmp_path / "plain", tmp_path / "out", "nvfp4a16")
    metadata, text = card(tmp_path / "out")
    assert text.count("<!-- amaxbridge -->") == 1
    assert "base_model" not in metadata  # where the source has no name on the Hub, it is not guessed
    assert metadata["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "readme", [None, "", "# No metadata\n", "---\nlicense: [a\n---\n# Broken\n", "---\n- a\n---\n"]
)
def test_sources_without_a_good_card(source: Path, tmp_path: Path, readme: str | None) -> None:
    (source / "README.md").unlink() if readme is None else (source / "README.md").write_text(readme)
    model_free_ptq(source, tmp_path / "out", "nvfp4a16")
    metadata, text = card(tmp_path / "out")
    assert metadata["tags"] == ["amaxbridge", "compressed-tensors", "nvfp4a16"]
    assert "license" not in metadata
    assert ("# No metadata" in text) == (readme is not None and "# No metadata" in readme)


def test_the_command_shows_no_places_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["input=/data/Qwen3-8B/", "output=out/nvfp4", "scheme=nvfp4", "a b"]
    monkeypatch.setattr("sys.argv", ["/home/me/amaxbridge/scripts/quantize.py", *words])
    assert command_line("quantize") == "amaxbridge quantize input=Qwen3-8B output=out/nvfp4 scheme=nvfp4 'a b'"
