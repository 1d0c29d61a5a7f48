"""Checkpoints in the formats of other programs on their way into training: what stays quantized, and what it means."""

import json
from pathlib import Path

import pytest
import torch

from amaxbridge.export import model_free_ptq
from amaxbridge.export.dequantized import DequantizedCheckpoint, open_dequantized
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.schemes import Groups
from amaxbridge.export.schemes.signature import UnsupportedQuantizationError
from amaxbridge.mappings.errors import CheckpointError
from tests.export.model_free.test_quantized_sources import KINDS, source_of
from tests.support.checkpoints import tensors_of

QUANTIZED = 7
KEPT = {  # what is kept when nothing is declared but the format's name; the others are dequantized
    "fp8 blocks": "fp8_block",
    "fp8 blocks, e8m0": "fp8_block",
    "fp8 blocks, .scale in e8m0": "fp8_block",
    "fp8 per tensor, as Mistral": "fp8",
    "modelopt nvfp4": "nvfp4",
    "awq": "w4a16_asym",
    "awq without zero points": "w4a16",
    "gptq": "w4a16_asym",
    "gptq symmetric": "w4a16",
    "gptq, 8 bits": None,  # with zero points, which w8a16 has not
}
AWQ_FACTORS = ("modelopt nvfp4 after awq", "modelopt int4 awq")
OTHERS_THAN_DECLARED = (  # all are held with quant_algo NVFP4
    "modelopt nvfp4, weights alone", "modelopt fp8", "modelopt fp8 per row", "modelopt mxfp4", "modelopt int8",
)  # fmt: skip


def opened(source: Path) -> tuple[SafetensorsCheckpoint, DequantizedCheckpoint]:
    config = json.loads((source / "config.json").read_text())
    checkpoint = SafetensorsCheckpoint(source)
    return checkpoint, open_dequantized(checkpoint, config)


def test_every_kind_is_here() -> None:
    assert {*KEPT, *AWQ_FACTORS, *OTHERS_THAN_DECLARED, "gptq of sorted columns"} == {*KINDS}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OTHERS_THAN_DECLARED])
def test_a_weight_is_what_the_source_means(kind: str, tmp_path: Path) -> None:
    hold, declared = KINDS[kind]
    source, _, meant = source_of(tmp_path / "in", hold, declared)
    checkpoint, weights = opened(source)
    wanted = KEPT.get(kind)
    tolerance = 2**-3 if wanted == "fp8" else 2**-7  # codes of a fused group are rounded to its largest scale
    with checkpoint:
        assert {scheme.name for scheme in weights.schemes.values()} == ({wanted} if wanted else set())
        assert len(weights.schemes) + len(weights.dequantized) == QUANTIZED
        seen = 0
        for name in (name for name in meant if name.endswith("_proj.weight")):
            found = weights.read(name)
            if wanted is None:
                assert torch.equal(found.bfloat16(), meant[name])
            else:
                apart = (found.float() - meant[name].float()).abs()
                assert (apart <= tolerance * meant[name].float().abs().clamp(min=2**-10)).all()
            seen += 1
        assert seen == QUANTIZED
        assert len(weights.changed) == (QUANTIZED if wanted == "w4a16" else 0)
        assert not any(change.codes for change in weights.changed.values())  # fp16 scales, which become bf16


@pytest.mark.parametrize("kind", [kind for kind, scheme in KEPT.items() if scheme and "modelopt" not in kind])
def test_what_is_kept_has_the_tensors_that_quantize_keeps(kind: str, tmp_path: Path) -> None:
    hold, declared = KINDS[kind]
    source, _, _ = source_of(tmp_path / "in", hold, declared)
    checkpoint, weights = opened(source)
    with checkpoint:
        model_free_ptq(source, tmp_path / "out", Groups.of(next(iter(weights.schemes.values()))))
        written = tensors_of(tmp_path / "out")
        assert written.keys() == weights.checkpoint.weight_map.keys()
        for name, tensor in written.items():
            assert torch.equal(weights.checkpoint.read(name), tensor), name


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("fp8 blocks", "fp8_block"), ("fp8 blocks, .scale in e8m0", "fp8_block"), ("modelopt nvfp4", "nvfp4"),
     ("modelopt nvfp4, weights alone", None), ("modelopt fp8", "fp8"), ("modelopt mxfp4", None)],
)  # fmt: skip
def test_a_source_that_declares_nothing(kind: str, scheme: str | None, tmp_path: Path) -> None:
    """Without an input scale, nothing says if ModelOpt quantized inputs as they came."""
    source, _, _ = source_of(tmp_path / "in", KINDS[kind][0], {})
    checkpoint, weights = opened(source)
    with checkpoint:
        assert [each.name for each in weights.schemes.values()] == ([scheme] * QUANTIZED if scheme else [])
        assert len(weights.dequantized) == (0 if scheme else QUANTIZED)


@pytest.mark.parametrize("kind", OTHERS_THAN_DECLARED)
def test_tensors_in_another_format_than_declared(kind: str, tmp_path: Path) -> None:
    hold, declared = KINDS[kind]
    source, _, _ = source_of(tmp_path / "in", hold, declared)
    with pytest.raises(CheckpointError, match=r"is not what its config.json says"):
        opened(source)


def test_a_config_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    hold, declared = KINDS["modelopt nvfp4"]
    source, _, _ = source_of(tmp_path / "in", hold, {**declared, "rotation": "hadamard"})
    with pytest.raises(UnsupportedQuantizationError, match="rotation is an unknown key"):
        opened(source)
