"""Mixture of experts on real Megatron ranks: the same bytes at every topology, each expert under its own number."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch

from amaxbridge.mappings.fused_groups import groups_among
from tests.support.checkpoints import tensors_in
from tests.support.comparing import compare_logits, label, same_files, same_tensors
from tests.support.launcher import Launcher, LiveRanks
from tests.support.paths import ROOT

TOPOLOGIES: list[dict[str, int]] = [
    {"processes": 2, "tp": 2},
    {"processes": 2, "tp": 1, "ep": 2},
    {"processes": 4, "tp": 1, "ep": 4},
    {"processes": 4, "tp": 1, "ep": 2},  # two expert-data-parallel replicas
    {"processes": 4, "tp": 2, "ep": 2},
    {"processes": 2, "tp": 2, "ep": 2, "etp": 1},
    {"processes": 2, "tp": 2, "ep": 1, "etp": 1},
    {"processes": 2, "tp": 1, "ep": 1, "etp": 2},
    {"processes": 4, "tp": 1, "ep": 2, "etp": 2},
    {"processes": 2, "tp": 1, "pp": 2},
    {"processes": 4, "tp": 1, "pp": 2, "ep": 2},
    {"processes": 4, "tp": 2, "pp": 2, "ep": 2, "etp": 1},
]
MIXED_TOPOLOGIES: list[dict[str, int]] = [
    {"processes": 2, "tp": 2, "ep": 2, "etp": 1},
    {"processes": 2, "tp": 1, "pp": 2, "vpp": 2},
    {"processes": 4, "tp": 1, "pp": 2, "vpp": 2, "ep": 2},
]


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=label)
def test_every_topology_writes_the_same_bytes(live_moe: LiveRanks, sizes: dict[str, int]) -> None:
    one, other = live_moe.at(), live_moe.at(**sizes)
    assert len(list((one / "nvfp4").glob("*.safetensors"))) > 1, "several shards, so that ranks share files"
    same_files(one / "nvfp4", other / "nvfp4")
    same_files(one / "plain", other / "plain")
    same_files(one / "nvfp4", other / "mirrored")  # the amax went to Hugging Face names and back
    same_tensors(other / "plain", live_moe.hf)


@pytest.mark.parametrize("sizes", MIXED_TOPOLOGIES, ids=label)
def test_dense_layers_among_them_and_virtual_pipeline_stages(live_moe_mixed: LiveRanks, sizes: dict[str, int]) -> None:
    one, other = live_moe_mixed.at(), live_moe_mixed.at(**sizes)
    same_files(one / "nvfp4", other / "nvfp4")
    same_files(one / "plain", other / "plain")
    same_tensors(other / "plain", live_moe_mixed.hf)


def test_experts_differ_so_that_a_wrong_number_shows(live_moe: LiveRanks) -> None:
    """The tests above would pass on a model whose ranks had all initialized the same experts."""
    tensors = tensors_in(live_moe.at() / "nvfp4")
    for kind in ("weight_packed", "weight_global_scale", "input_global_scale"):
        values = [tensor.numpy().tobytes() for name, tensor in tensors.items() if name.endswith(f"down_proj.{kind}")]
        assert len(values) == 16
        assert len(set(values)) == 16, kind


def test_the_amax_of_each_expert_is_its_own(live_moe: LiveRanks) -> None:
    """The oracle is the hash of each amax. Other tests would not notice if all experts were swapped alike."""

    def amax(quantizer: str) -> float:
        digest = hashlib.sha256(quantizer.encode()).digest()
        return 0.25 + int.from_bytes(digest[:3], "little") / 2**24

    tensors = tensors_in(live_moe.at(processes=4, tp=2, ep=2) / "nvfp4")
    for layer, expert in itertools.product(range(2), range(8)):
        for linear, parts in (("linear_fc1", ("gate", "up")), ("linear_fc2", ("down",))):
            for kind, part in itertools.product(("weight", "input"), parts):
                expected = 2688 / amax(f"{layer}.mlp.experts.{expert}.{linear}.{kind}_quantizer")
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.{kind}_global_scale"
                assert tensors[name].item() == pytest.approx(expected, rel=1e-6), name


def test_ranks_hold_experts_and_layers_under_global_numbers(live_moe: LiveRanks, live_moe_mixed: LiveRanks) -> None:
    def held(directory: Path, rank: int, kind: str) -> list[str]:
        names: list[str] = json.loads((directory / f"names_{rank}.json").read_text())[kind]
        return names

    both = live_moe.at(processes=2, ep=2)
    prefix = "decoder.layers.1.mlp.experts.linear_fc2.weight"
    for rank, experts in enumerate([range(4), range(4, 8)]):
        found = [name for name in held(both, rank, "parameters") if name.startswith(prefix)]
        assert found == [f"{prefix}{expert}" for expert in experts]
        found = [name for name in held(both, rank, "quantizers") if name.startswith(f"{prefix}_quantizer")]
        assert found == [f"{prefix}_quantizer.{expert}" for expert in experts]

    chunks = live_moe_mixed.at(processes=2, pp=2, vpp=2)
    for rank, layers in enumerate([{"0", "2"}, {"1", "3"}]):
        names = [name for name in held(chunks, rank, "parameters") if name.startswith("decoder.layers")]
        assert {name.split(".")[2] for name in names} == layers


@pytest.mark.parametrize("export", ["nvfp4", "calibrated"])
def test_scales_of_every_expert(live_moe: LiveRanks, export: str) -> None:
    """Every expert has finite positive scales; gate and up share one, because an engine uses the gate's for both."""
    tensors = tensors_in(live_moe.at(processes=2, ep=2) / export)
    for kind in ("weight_global_scale", "input_global_scale"):
        scales = {name.removesuffix(f".{kind}"): t for name, t in tensors.items() if name.endswith(kind)}
        assert len(scales) == 2 * (4 + 8 * 3)
        assert all(bool(torch.isfinite(scale) & (scale > 0)) for scale in scales.values())
        for layer in range(2):
            for expert in range(8):
                parent = f"model.layers.{layer}.mlp.experts.{expert}"
                assert {f"{parent}.{part}_proj" for part in ("gate", "up", "down")} <= scales.keys()
        for group in groups_among(scales):
            assert len({scales[member].item() for member in group.members}) == 1, group


def test_weights_of_every_expert_are_what_modelopt_makes_of_them(live_moe: LiveRanks) -> None:
    """Calibrated at EP=2; codes and scales against NVFP4QTensor with the amax of the source's gate and up together."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    source, exported = tensors_in(live_moe.hf), tensors_in(live_moe.at(processes=2, ep=2) / "calibrated")
    modules = [name.removesuffix(".weight_packed") for name in exported if name.endswith(".weight_packed")]
    assert len(modules) == 2 * (4 + 8 * 3)
    for group in groups_among(modules):
        amax = torch.stack([source[f"{member}.weight"].abs().max() for member in group.members]).max().float()
        for member in group.members:
            expected, scale, _ = NVFP4QTensor.quantize(
                source[f"{member}.weight"], 16, weights_scaling_factor_2=amax / 2688
            )
            assert torch.equal(exported[f"{member}.weight_packed"], expected._quantized_data)
            assert torch.equal(exported[f"{member}.weight_scale"].view(torch.uint8), scale.view(torch.uint8))
            assert exported[f"{member}.weight_global_scale"].item() == (1 / (amax / 2688)).item()


def test_routers_stay_as_they_are_and_are_ignored(live_moe: LiveRanks) -> None:
    exported = live_moe.at(processes=2, ep=2) / "nvfp4"
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]
    source, tensors = tensors_in(live_moe.hf), tensors_in(exported)
    for layer in range(2):
        assert torch.equal(
            tensors[f"model.layers.{layer}.mlp.gate.weight"], source[f"model.layers.{layer}.mlp.gate.weight"]
        )
    assert not [name for name in tensors if "quantizer" in name or "gate_up_proj" in name]


def test_a_tied_head_is_ignored_by_its_name(live_moe_mixed: LiveRanks) -> None:
    """A tied head has no tensor but is a Linear: if it were not ignored, transformers would fail to load it."""
    exported = live_moe_mixed.at() / "nvfp4"
    assert "lm_head.weight" not in tensors_in(exported)
    assert "lm_head" in json.loads((exported / "config.json").read_text())["quantization_config"]["ignore"]


@pytest.mark.parametrize(
    "sizes", [{}, {"processes": 2, "tp": 1, "ep": 2}, {"processes": 4, "tp": 2, "ep": 2}], ids=label
)
def test_transformers_computes_what_megatron_computed(live_moe: LiveRanks, sizes: dict[str, int]) -> None:
    """The plain export, fp32 on both sides. Not the quantized one: transformers drops its experts' global scales."""
    compare_logits(live_moe.at(**sizes))


def test_transformers_agrees_on_unnormalized_expert_weights_and_dense_layers(live_moe_mixed: LiveRanks) -> None:
    compare_logits(live_moe_mixed.at())


def test_an_uncalibrated_expert_is_refused_on_every_rank(live_moe: LiveRanks) -> None:
    """An engine combines the input scales of all experts of a layer: one that is missing poisons the layer."""
    directory = live_moe.at(processes=2, ep=2)
    messages = [(directory / f"refusal_{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "model.layers.1.mlp.experts.5.down_proj.input_quantizer._amax: missing" in messages[0]
    assert not (directory / "refused").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_saved_at_ep_2_exports_the_same_bytes(
    live_moe: LiveRanks, launch: Launcher, tmp_path: Path, processes: int
) -> None:
    checkpoint = live_moe.at(processes=2, ep=2) / "checkpoint"
    words = [f"checkpoint={checkpoint}", f"hf={live_moe.hf}", f"output={tmp_path / 'out'}", "io.max_shard_gb=6e-5"]
    launch(ROOT / "scripts" / "export.py", *words, processes=processes)
    same_files(tmp_path / "out", live_moe.at() / "nvfp4")
