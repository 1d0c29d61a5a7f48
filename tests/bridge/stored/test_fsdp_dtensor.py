"""Checkpoints of Megatron-FSDP, saved by real ranks: the bytes of a torch_dist export of the same model."""

from pathlib import Path

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.stored.identification import identify
from amaxbridge.bridge.stored.open_checkpoint import open_checkpoint
from amaxbridge.bridge.stored.stored_source import Region
from amaxbridge.mappings.errors import CheckpointError
from tests.support.comparing import same_files
from tests.support.launcher import Launcher, LiveRanks

SIZES = {"dense dp=2": ("qwen3", 1, 1), "dense tp=2": ("qwen3", 2, 1), "moe ep=2": ("qwen3_moe", 1, 2)}


@pytest.fixture(scope="module")
def saved(launch: Launcher, qwen3: Path, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {"qwen3": qwen3, "qwen3_moe": qwen3_moe}
    ranks = {name: LiveRanks(launch, "live_fsdp.py", hf, tmp_path_factory.mktemp(name)) for name, hf in models.items()}
    return {
        case: ranks[name].at(processes=2, tp=tp, **({"ep": ep} if ep > 1 else {}))
        for case, (name, tp, ep) in SIZES.items()
    }


@pytest.fixture(scope="module")
def hf(qwen3: Path, qwen3_moe: Path) -> dict[str, Path]:
    return {case: qwen3_moe if name == "qwen3_moe" else qwen3 for case, (name, _, _) in SIZES.items()}


@pytest.mark.parametrize("case", SIZES)
def test_the_bytes_of_torch_dist(case: str, saved: dict[str, Path], hf: dict[str, Path], tmp_path: Path) -> None:
    """Training kept fp32 main parameters, which round to the bf16 weights."""
    for name in ("torch_dist", "fsdp"):
        AutoBridge.from_hf_pretrained(hf[case]).convert_checkpoint(
            saved[case] / name, tmp_path / name, scheme="fp8_block", max_shard_bytes=60_000
        )
    same_files(tmp_path / "torch_dist", tmp_path / "fsdp")


def test_without_hf(saved: dict[str, Path], tmp_path: Path) -> None:
    """The saved arguments describe the model, as in a torch_dist checkpoint."""
    for name in ("torch_dist", "fsdp"):
        bridge = AutoBridge.from_megatron_checkpoint(saved["moe ep=2"] / name, vocab_size=131)
        bridge.convert_checkpoint(saved["moe ep=2"] / name, tmp_path / name, scheme="none")
    same_files(tmp_path / "torch_dist", tmp_path / "fsdp")
    assert "Qwen3MoeForCausalLM" in identify(saved["moe ep=2"] / "fsdp")


def test_weights_are_the_main_parameters(saved: dict[str, Path]) -> None:
    opened = open_checkpoint(saved["dense tp=2"] / "fsdp")
    (gate,) = opened.read([Region("decoder.layers.1.mlp.linear_fc1.weight_w")])
    (fused,) = open_checkpoint(saved["dense tp=2"] / "torch_dist").read(
        [Region("decoder.layers.mlp.linear_fc1.weight", (1,))]
    )
    assert gate.dtype == torch.float32
    assert torch.equal(gate.bfloat16(), fused.chunk(2)[0])


@pytest.mark.parametrize("case", ["dense dp=2", "dense tp=2"])
def test_quantizers_are_refused(case: str, saved: dict[str, Path], hf: dict[str, Path], tmp_path: Path) -> None:
    """Megatron-FSDP saves their amax, but not the states of modules, which hold their configuration."""
    with pytest.raises(CheckpointError, match=r"amax without a quantizer configuration[\s\S]*linear_qkv\.input_quant"):
        AutoBridge.from_hf_pretrained(hf[case]).convert_checkpoint(saved[case] / "quantized", tmp_path / "out")
    assert not list(tmp_path.iterdir())
