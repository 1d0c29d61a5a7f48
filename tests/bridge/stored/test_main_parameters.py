"""weights=fp32_main: what Megatron's optimizers keep of 16-bit weights, saved by real ranks after a step."""

from pathlib import Path
from typing import Unpack

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.export.schemes import Groups, SchemeGroup, named_scheme
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.output_options import SaveKeywords
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_files
from tests.support.launcher import Launcher, LiveRanks

MESHES = {"dense tp=2": ("qwen3", {"tp": 2}), "moe ep=2": ("qwen3_moe", {"tp": 1, "ep": 2})}


@pytest.fixture(scope="module", params=MESHES)
def saved(request: pytest.FixtureRequest, launch: Launcher, shared: Path) -> tuple[Path, Path]:
    """The Hugging Face directory, and what the ranks saved."""
    name, sizes = MESHES[request.param]
    hf = request.getfixturevalue(name)
    return hf, LiveRanks(launch, "live_optimizer.py", hf, shared / f"optimizer_{name}").at(processes=2, **sizes)


def convert(hf: Path, checkpoint: Path, output: Path, **options: Unpack[SaveKeywords]) -> Path:
    AutoBridge.from_hf_pretrained(hf).convert_checkpoint(checkpoint, output, max_shard_bytes=60_000, **options)
    return output


@pytest.mark.parametrize("kind", ["fully_reshardable", "whole"])
def test_the_bytes_of_a_model_that_has_them_as_weights(saved: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    hf, ranks = saved
    for scheme in ("none", "nvfp4"):
        out = convert(hf, ranks / kind, tmp_path / scheme, scheme=scheme, weights="fp32_main", dtype="float32")
        same_files(out, ranks / f"live_{scheme}")


def test_all_layers_in_one_tensor(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """Training without quantizers stores weights and main parameters so."""
    hf, ranks = saved
    out = convert(hf, ranks / "plain", tmp_path / "out", scheme="none", weights="fp32_main", dtype="float32")
    same_files(out, ranks / "live_none")


def test_they_round_to_the_weights(saved: tuple[Path, Path], tmp_path: Path) -> None:
    hf, ranks = saved
    main = convert(hf, ranks / "plain", tmp_path / "main", scheme="none", weights="fp32_main")
    same_files(main, convert(hf, ranks / "plain", tmp_path / "model", scheme="none"))


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_dynamic"])
def test_only_weights_that_are_quantized_stay_in_fp32(saved: tuple[Path, Path], tmp_path: Path, scheme: str) -> None:
    """Their codes are those of fp32; everything else is in the dtype of config.json."""
    hf, ranks = saved
    kind = "fully_reshardable" if scheme == "nvfp4" else "plain"
    mixed = tensors_in(convert(hf, ranks / kind, tmp_path / "mixed", scheme=scheme, weights="fp32_main"))
    model = tensors_in(convert(hf, ranks / kind, tmp_path / "model", scheme=scheme))
    main = tensors_in(convert(hf, ranks / kind, tmp_path / "main", scheme=scheme, weights="fp32_main", dtype="float32"))
    assert mixed.keys() == model.keys() == main.keys()
    seen, other = 0, 0
    for name, tensor in mixed.items():
        if main[name].dtype == torch.float32 and model[name].dtype == torch.bfloat16 and "_scale" not in name:
            assert torch.equal(tensor, model[name]), name
        else:
            seen += 1
            assert torch.equal(tensor.view(torch.uint8), main[name].view(torch.uint8)), name
            other += not torch.equal(tensor.view(torch.uint8), model[name].view(torch.uint8))
    assert seen > 20
    assert other > 0, "the codes of fp32 weights are those of bf16 weights"


@pytest.mark.parametrize("kind", ["dp_reshardable", "dp_zero_gather_scatter"])
def test_flat_buffers_are_refused(saved: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    hf, ranks = saved
    with pytest.raises(CheckpointError, match=r"in flat buffers, which name no parameter.*fully-reshardable") as error:
        convert(hf, ranks / kind, tmp_path / "out", scheme="nvfp4", weights="fp32_main")
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_packed_integers_are_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    hf, ranks = saved
    recipe = Groups((SchemeGroup(named_scheme("w4a16", 32)),))
    with pytest.raises(UsageError, match=r"hold the scales of w4a16 in the dtype of the model.*dtype=float32"):
        convert(hf, ranks / "plain", tmp_path / "out", scheme=recipe, weights="fp32_main")
    convert(hf, ranks / "plain", tmp_path / "out", scheme=recipe, weights="fp32_main", dtype="float32")


def test_other_refusals(qwen3: Path, tmp_path: Path) -> None:
    """No optimizer; a shape that is not the weight's, as an older Megatron flattened it; another word."""
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    main = "optimizer.state.fp32_param.decoder.final_layernorm.weight"
    cases = {
        "no fp32 main parameters of 1 weights": {"decoder.final_layernorm.weight": weight},
        "are not stored as their weights": {"decoder.final_layernorm.weight": weight, main: torch.ones(16)},
        "not stored as their weights:\n  ": {"decoder.final_layernorm.weight": weight, main: weight},
    }
    for number, (message, state) in enumerate(cases.items()):
        save(dict(state), storage_writer=FileSystemWriter(tmp_path / str(number)), no_dist=True)
        with pytest.raises(CheckpointError) as error:
            convert(qwen3, tmp_path / str(number), tmp_path / "out", weights="fp32_main")
        assert message in str(error.value)
        assert "decoder.final_layernorm.weight" in str(error.value)
    for options, message in (
        ({"weights": "fp64"}, "unknown weights=fp64; known: model, fp32_main"),
        ({"weights": "fp32_main", "adapter": "merge"}, "exclude each other"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(qwen3, tmp_path / "0", tmp_path / "out", **options)
