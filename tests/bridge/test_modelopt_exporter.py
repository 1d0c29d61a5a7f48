"""ModelOpt's exporter of Hugging Face models: it writes what `format=modelopt` writes, and is read back whole."""

import copy
import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from torch import Tensor

from amaxbridge.export import model_free_ptq
from amaxbridge.export.dequantized import open_dequantized
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import CheckpointError
from tests.support.checkpoints import tensors_in
from tests.support.tiny_models import config, randomize

PRESETS = {
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4a16": "W4A16_NVFP4_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_dynamic": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
}
UNSERVED = ("mxfp4",)  # whose config does not say if inputs are quantized
QUANTIZED = 7
FUSED = {f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")}
"""FP8: ModelOpt gives each member a scale of its own, and engines round all to the largest when they load."""
EMBEDDING = "model.embed_tokens"  # which ModelOpt lists as excluded, and no engine quantizes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, whose rows and columns are made of several blocks of 128."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1}
    made = config("Qwen3ForCausalLM", **sizes, head_dim=128, num_hidden_layers=1, tie_word_embeddings=False)()
    model = transformers.AutoModelForCausalLM.from_config(made)
    randomize(model)
    directory = tmp_path_factory.mktemp("plain")
    model.bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def theirs(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What ModelOpt writes, by scheme."""
    written = {}
    for scheme, preset in PRESETS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
        mtq.quantize(model, copy.deepcopy(getattr(mtq, preset)), lambda model: model(torch.arange(64)[None]))
        written[scheme] = tmp_path_factory.mktemp(scheme)
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=str(written[scheme]))
    return written


def specs_of(directory: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors_in(directory).items()}


def said_by(directory: Path) -> list[Any]:
    """Both configs, without the embedding in their lists."""
    beside = json.loads((directory / "hf_quant_config.json").read_text())
    inside = json.loads((directory / "config.json").read_text())["quantization_config"]
    for excluded in (beside["quantization"]["exclude_modules"], inside["ignore"]):
        if EMBEDDING in excluded:
            excluded.remove(EMBEDDING)
    return [beside, inside]


def same_bits(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("scheme", [scheme for scheme in PRESETS if scheme not in ("nvfp4", "fp8")])
def test_names_dtypes_shapes_and_configs(scheme: str, plain: Path, theirs: dict[str, Path], tmp_path: Path) -> None:
    """Of schemes without calibration, whose arithmetic here is compressed-tensors'."""
    model_free_ptq(plain, tmp_path / "out", scheme, format="modelopt", verify=scheme not in UNSERVED)
    assert specs_of(tmp_path / "out") == specs_of(theirs[scheme])
    assert said_by(tmp_path / "out") == said_by(theirs[scheme])


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "fp8_block"])
def test_fp8_without_data_tensor_by_tensor(scheme: str, plain: Path, theirs: dict[str, Path], tmp_path: Path) -> None:
    """Scales are ModelOpt's, rounded as compressed-tensors rounds them, in bf16; codes lie at most one code apart."""
    model_free_ptq(plain, tmp_path / "out", scheme, format="modelopt")
    ours, expected = tensors_in(tmp_path / "out"), tensors_in(theirs[scheme])
    seen = 0
    for name, tensor in ours.items():
        other = expected[name]
        if name.endswith("weight_scale"):
            seen += 1
            assert ((tensor - other).abs() <= 2**-8 * other).all(), name
            assert torch.equal(tensor, tensor.bfloat16().float()), name
        elif tensor.dtype == torch.float8_e4m3fn:
            steps = (ordinal(tensor) - ordinal(other)).abs()
            assert steps.max() <= 1, name
            assert (steps > 0).float().mean() < 0.05, name
        else:
            assert same_bits(tensor, other), name
    assert seen == QUANTIZED


def ordinal(codes: Tensor) -> Tensor:
    """The place of E4M3 numbers among all of them, zero in the middle."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


@pytest.mark.parametrize("scheme", PRESETS)
def test_what_modelopt_wrote_is_kept_bit_for_bit(scheme: str, theirs: dict[str, Path], tmp_path: Path) -> None:
    served = scheme not in UNSERVED
    report = model_free_ptq(theirs[scheme], tmp_path / "out", scheme, format="modelopt", verify=served)
    assert len(report.kept) == QUANTIZED
    stored, found = tensors_in(theirs[scheme]), tensors_in(tmp_path / "out")
    assert stored.keys() == found.keys()
    differ = {name.rpartition(".")[0] for name, tensor in stored.items() if not same_bits(tensor, found[name])}
    assert differ <= (FUSED if scheme == "fp8" else set())
    assert said_by(tmp_path / "out") == said_by(theirs[scheme])


@pytest.mark.parametrize("scheme", [scheme for scheme in PRESETS if scheme not in UNSERVED])
def test_it_is_imported_with_its_quantizers_and_served(scheme: str, theirs: dict[str, Path]) -> None:
    said = json.loads((theirs[scheme] / "config.json").read_text())
    with SafetensorsCheckpoint(theirs[scheme]) as checkpoint:
        weights = open_dequantized(checkpoint, said)
        assert [each.name for each in weights.schemes.values()] == [scheme] * QUANTIZED
        for module in weights.schemes:
            assert weights.read(f"{module}.weight").isfinite().all()
        assert {module for module, change in weights.changed.items() if change.codes} <= (
            FUSED if scheme == "fp8" else set()
        )
    failures = {finding.rule for finding in verify(theirs[scheme]).verdict_of("vllm").failures}
    assert failures == ({"fused-weight-scales"} if scheme == "fp8" else set())


def test_mxfp4_is_imported_in_16_bits_and_written_only_if_asked_twice(
    plain: Path, theirs: dict[str, Path], tmp_path: Path
) -> None:
    """ModelOpt's `mxfp4` stands for quantized inputs and for plain ones, and the engines do not know it."""
    said = json.loads((theirs["mxfp4"] / "config.json").read_text())
    with SafetensorsCheckpoint(theirs["mxfp4"]) as checkpoint:
        weights = open_dequantized(checkpoint, said)
        assert not weights.schemes
        assert len(weights.dequantized) == QUANTIZED
    for engine in ("vllm", "sglang", "transformers", "runtime"):
        assert not verify(theirs["mxfp4"]).verdict_of(engine).serves
    for scheme in ("mxfp4", "mxfp4a16"):
        with pytest.raises(CheckpointError, match="ModelOpt currently only supports"):
            model_free_ptq(plain, tmp_path / "refused", scheme, format="modelopt")
        model_free_ptq(plain, tmp_path / scheme, scheme, format="modelopt", verify=False)
    assert specs_of(tmp_path / "mxfp4") == specs_of(tmp_path / "mxfp4a16") == specs_of(theirs["mxfp4"])
