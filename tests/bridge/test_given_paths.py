"""Paths that a user gives and that lead nowhere, at every public entry."""

from collections.abc import Callable
from pathlib import Path

import pytest

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.export import model_free_ptq
from amaxbridge.export.model_free.per_file import process_file, validate_file
from amaxbridge.export.repair import repair
from amaxbridge.export.report import write_report
from amaxbridge.export.runtime import load_linear
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.support.checkpoints import dense_model, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "in", dense_model(layers=1))


def beside(source: Path) -> Path:
    return source.parent / "out"


ENTRIES: dict[str, Callable[[str, Path], object]] = {
    "quantize": lambda path, source: model_free_ptq(path, beside(source), "nvfp4a16"),
    "quantize output=": lambda path, source: model_free_ptq(source, path, "nvfp4a16"),
    "quantize quant_state=": lambda path, source: model_free_ptq(source, beside(source), "nvfp4", quant_state=path),
    "process_file": lambda path, source: process_file({path: None}, beside(source), "nvfp4a16"),
    "validate_file": lambda path, source: validate_file({path: None}, beside(source), "nvfp4a16"),
    "verify": lambda path, _: verify(path),
    "verify reference=": lambda path, source: verify(source, reference=path),
    "report": lambda path, _: write_report(Path(path)),
    "report reference=": lambda path, source: write_report(source, reference=Path(path)),
    "report quant_state=": lambda path, source: write_report(source, quant_state=Path(path)),
    "repair": lambda path, source: repair(path, beside(source)),
    "repair output=": lambda path, source: repair(source, path),
    "runtime": lambda path, _: load_linear(path, "model.layers.0.mlp.down_proj"),
    "read_hf_model": lambda path, _: read_hf_model(path),
    "export": lambda path, source: AutoBridge.from_hf_pretrained(source).convert_checkpoint(path, beside(source)),
    "export without hf=": lambda path, _: AutoBridge.from_megatron_checkpoint(path),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_it_ends_in_an_error_of_ours(source: Path, tmp_path: Path, entry: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    paths = ["a\0b", "o" * 256, "/".join(["o"] * 4000), "~nobody-of-this-name/x", str(tmp_path / "circle"), "a\ud800b"]
    before = sorted(tmp_path.iterdir())
    for path in paths:
        with pytest.raises(AmaxbridgeError):
            ENTRIES[entry](path, source)
    assert sorted(tmp_path.iterdir()) == before
    assert len(paths) == 6
