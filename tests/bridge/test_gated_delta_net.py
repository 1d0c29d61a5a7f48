"""Qwen3-Next on real Megatron ranks: gated delta nets, quantized too, and an MTP layer under names of its own."""

import hashlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from amaxbridge import verify
from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import check_parallel_sizes, read_hf_model
from amaxbridge.bridge.stored.saved_arguments import disagreements
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.megatron_settings import to_arguments
from amaxbridge.mappings.names import module_of
from tests.support.checkpoints import tensors_in
from tests.support.comparing import label, same_files, same_tensors
from tests.support.hf_models import make_qwen3_next
from tests.support.launcher import Launcher, LiveRanks
from tests.support.made_once import made_once
from tests.support.paths import WORKERS

TOPOLOGIES: list[dict[str, int]] = [{"tp": 2}, {"processes": 2, "pp": 2}]
DELTA = "model.layers.0.linear_attn"


@pytest.fixture(scope="module")
def qwen3_next(transformers: ModuleType, shared: Path) -> Path:
    return made_once(shared / "qwen3_next", make_qwen3_next)


@pytest.fixture(scope="module")
def live_delta(launch: Launcher, qwen3_next: Path, shared: Path) -> LiveRanks:
    return LiveRanks(launch, "live_delta.py", qwen3_next, shared / "live_delta")


def test_weights_come_back_bit_for_bit(live_delta: LiveRanks) -> None:
    """The MTP layer too, and the norm that Megatron centres at zero."""
    same_tensors(live_delta.at() / "plain", live_delta.hf)


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=label)
def test_every_topology_writes_the_same_bytes(live_delta: LiveRanks, sizes: dict[str, int]) -> None:
    one, other = live_delta.at(), live_delta.at(**sizes)
    for written in ("plain", "nvfp4") if "pp" in sizes else ("plain", "nvfp4", "fp8"):
        same_files(one / written, other / written)
    same_files(other / "nvfp4", other / "mirrored")


def test_what_is_quantized(live_delta: LiveRanks) -> None:
    """Every linear, the projection to beta and alpha too; never convolution, decay, time step or norm."""
    tensors = tensors_in(live_delta.at() / "nvfp4")
    quantized = {module_of(name) for name in tensors if name.endswith(".weight_packed")}
    delta = {name.removeprefix(f"{DELTA}.") for name in quantized if name.startswith(DELTA)}
    assert delta == {"in_proj_qkvz", "in_proj_ba", "out_proj"}
    assert {name for name in quantized if name.startswith("mtp.")} >= {"mtp.fc", "mtp.layers.0.self_attn.q_proj"}
    for name in ("conv1d.weight", "A_log", "dt_bias", "norm.weight"):
        assert tensors[f"{DELTA}.{name}"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["weight", "input"])
def test_both_projections_have_the_amax_of_megatrons_one(live_delta: LiveRanks, kind: str) -> None:
    """The oracle is the hash from which the worker made each amax."""
    tensors = tensors_in(live_delta.at(tp=2) / "nvfp4")
    digest = hashlib.sha256(f"0.self_attention.in_proj.{kind}_quantizer".encode()).digest()
    amax = 0.25 + int.from_bytes(digest[:3], "little") / 2**24
    for projection in ("in_proj_qkvz", "in_proj_ba"):
        scale = tensors[f"{DELTA}.{projection}.{kind}_global_scale"]
        assert scale.item() == pytest.approx(2688 / amax, rel=1e-6)


def test_a_scale_for_each_row_follows_its_row(live_delta: LiveRanks) -> None:
    """ModelOpt calibrated Megatron's rows; the oracle is the largest weight in each row of Hugging Face's."""
    source, tensors = tensors_in(live_delta.hf), tensors_in(live_delta.at(tp=2) / "fp8")
    modules = [f"{DELTA}.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")]
    for module in (*modules, "model.layers.1.self_attn.q_proj"):
        rows = source[f"{module}.weight"].float().abs().amax(dim=1, keepdim=True)
        assert torch.allclose(tensors[f"{module}.weight_scale"].float() * 448, rows, rtol=1e-5), module


def test_a_checkpoint_saved_at_tp_2_exports_the_same_bytes(live_delta: LiveRanks, tmp_path: Path) -> None:
    bridge, checkpoint = AutoBridge.from_hf_pretrained(live_delta.hf), live_delta.at(tp=2) / "checkpoint"
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", max_shard_bytes=60_000)
    same_files(tmp_path / "out", live_delta.at() / "nvfp4")


def test_the_small_projection_stays_in_16_bits_on_demand(live_delta: LiveRanks, tmp_path: Path) -> None:
    """As ModelOpt's exporter leaves it, though Megatron has one quantizer for both."""
    bridge, checkpoint = AutoBridge.from_hf_pretrained(live_delta.hf), live_delta.at(tp=2) / "checkpoint"
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", ignore=["re:.*in_proj_(ba?|a)$"])
    found, source = tensors_in(tmp_path / "out"), tensors_in(live_delta.hf)
    assert torch.equal(found[f"{DELTA}.in_proj_ba.weight"], source[f"{DELTA}.in_proj_ba.weight"])
    assert f"{DELTA}.in_proj_qkvz.weight_packed" in found
    assert verify(tmp_path / "out", reference=live_delta.hf).ok


def test_rows_that_a_checkpoint_has_in_the_order_of_ranks_are_refused(live_delta: LiveRanks, tmp_path: Path) -> None:
    bridge, checkpoint = AutoBridge.from_hf_pretrained(live_delta.hf), live_delta.at(tp=2) / "fp8_checkpoint"
    with pytest.raises(CheckpointError, match=r"self_attention\.in_proj\.weight_quantizer\._amax is per-channel"):
        bridge.convert_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_export_goes_back_into_megatron(launch: Launcher, live_delta: LiveRanks, tmp_path: Path) -> None:
    source, checkpoint = live_delta.at() / "nvfp4", tmp_path / "checkpoint"
    step = {"sizes": {"tp": 2}, "hf": str(source), "import": str(checkpoint)}
    launch(WORKERS / "live_import.py", json.dumps([step]), processes=2)
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", scheme="nvfp4", max_shard_bytes=60_000)
    same_files(tmp_path / "out", source)


@pytest.mark.parametrize("written", ["plain", "nvfp4", "fp8"])
def test_verify(live_delta: LiveRanks, written: str) -> None:
    exported = live_delta.at() / written
    report = verify(exported, reference=live_delta.hf)
    assert report.ok, report
    assert verify(exported, engine="vllm").ok


def test_a_model_trained_with_other_norms_is_refused(live_delta: LiveRanks) -> None:
    """Their weights would be written one too large."""
    hf = read_hf_model(live_delta.hf)
    saved = to_arguments(hf.family.settings(hf.config))
    assert list(disagreements(saved, hf)) == []
    (found,) = disagreements({**saved, "layernorm_zero_centered_gamma": False}, hf)
    assert found == "--layernorm-zero-centered-gamma False, but config.json gives True"


def test_heads_that_do_not_divide_among_ranks_are_refused(live_delta: LiveRanks) -> None:
    hf = read_hf_model(live_delta.hf)
    with pytest.raises(UsageError, match=r"TP=4 does not divide 2 key heads of gated delta nets"):
        check_parallel_sizes(hf, world=4, tp=4, pp=1)


def test_more_mtp_layers_than_the_files_can_hold_are_refused(live_delta: LiveRanks) -> None:
    hf = read_hf_model(live_delta.hf)
    with pytest.raises(UsageError, match="num_nextn_predict_layers=2: each of Megatron's MTP layers has a projection"):
        hf.family.weight_settings({**hf.config, "num_nextn_predict_layers": 2})
    assert hf.registry.megatron_to_hf_lookup("mtp.layers.1.eh_proj.weight") is None
