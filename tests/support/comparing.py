"""Directories that ranks wrote, beside one another and beside transformers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from amaxbridge.export.output.config_and_index import CARD_FILE
from amaxbridge.export.output.provenance import RECORD_FILE
from tests.support.checkpoints import tensors_in


def label(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "processes")


def same_files(one: Path, other: Path) -> None:
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()}
    for name in files - {CARD_FILE, RECORD_FILE}:  # which name the command
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def same_tensors(exported: Path, source: Path) -> None:
    found, expected = tensors_in(exported), tensors_in(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def compare_logits(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = torch.load(directory / "logits.pt")
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory / "plain", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits = model(reference["tokens"]).logits
    error = float((logits - reference["logits"]).norm() / reference["logits"].norm())
    print(f"{directory.name}: {error:.2e}")
    assert error < 1e-4
