"""Exports from real Megatron ranks: the same bytes at every topology, exact codes, and the logits of Megatron."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from amaxbridge.export.kernels.nvfp4 import NVFP4Weight, dequantize
from amaxbridge.mappings.fused_groups import groups_among
from tests.support.checkpoints import tensors_in
from tests.support.launcher import LiveRanks

TOPOLOGIES = [(1, 1), (2, 1), (1, 2)]


@pytest.mark.parametrize(("tp", "pp"), TOPOLOGIES[1:])
@pytest.mark.parametrize("export", ["nvfp4", "plain"])
def test_every_topology_writes_the_same_bytes(live: LiveRanks, tp: int, pp: int, export: str) -> None:
    one, other = live.at() / export, live.at(tp=tp, pp=pp) / export
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()}
    if export == "nvfp4":
        assert sum(name.endswith(".safetensors") for name in files) > 1, "several shards, so that ranks share files"
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(("tp", "pp"), TOPOLOGIES)
def test_plain_weights_come_back_as_they_went_in(live: LiveRanks, tp: int, pp: int) -> None:
    """Hugging Face → Megatron → Hugging Face, with a vocabulary that TP=2 pads."""
    source, exported = tensors_in(live.hf), tensors_in(live.at(tp=tp, pp=pp) / "plain")
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(exported[name], tensor), name


def test_fused_groups_share_their_global_scales(live: LiveRanks) -> None:
    for export in ("nvfp4", "calibrated"):
        tensors = tensors_in(live.at(tp=2) / export)
        for kind in ("weight_global_scale", "input_global_scale"):
            modules = [name.removesuffix(f".{kind}") for name in tensors if name.endswith(kind)]
            groups = groups_among(modules)
            assert sorted(len(group.members) for group in groups) == [1, 1, 1, 1, 2, 2, 3, 3]
            for group in groups:
                assert len({tensors[f"{member}.{kind}"].item() for member in group.members}) == 1, group


def test_weights_are_what_modelopt_makes_of_them(live: LiveRanks) -> None:
    """Codes, block scales and dequantized values against ModelOpt's NVFP4QTensor with the calibrated amax."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    source, exported = tensors_in(live.hf), tensors_in(live.at(tp=2) / "calibrated")
    modules = [name.removesuffix(".weight_packed") for name in exported if name.endswith(".weight_packed")]
    assert len(modules) == 2 * 7
    for group in groups_among(modules):
        amax = torch.stack([source[f"{member}.weight"].abs().max() for member in group.members]).max().float()
        for member in group.members:
            second = amax / 2688
            expected, scale, _ = NVFP4QTensor.quantize(source[f"{member}.weight"], 16, weights_scaling_factor_2=second)
            assert torch.equal(exported[f"{member}.weight_packed"], expected._quantized_data)
            assert torch.equal(exported[f"{member}.weight_scale"].view(torch.uint8), scale.view(torch.uint8))
            assert exported[f"{member}.weight_global_scale"].item() == (1 / second).item()


def test_transformers_computes_what_megatron_computed(live: LiveRanks) -> None:
    """Every key is used, and the logits are the same but for the order of sums.

    The activations are fp32 on both sides: in bf16, sums that differ in their last bit move activations over edges of
    the 4-bit grid, and the error of the result is about the square root of that difference.
    """
    from transformers import AutoModelForCausalLM

    directory = live.at(tp=2)
    reference = torch.load(directory / "logits.pt")
    found = {}
    for name, export in (("nvfp4", "calibrated"), ("plain", "plain")):
        model, loading = AutoModelForCausalLM.from_pretrained(directory / export, output_loading_info=True)
        assert not any(loading.values()), loading
        with torch.no_grad():
            model(reference["tokens"])  # compressed-tensors decompresses on the first call, always to bf16
            torch.nn.Module.float(model)  # transformers' own refuses quantized models
            found[name] = model(reference["tokens"]).logits

    def error(one: Tensor, other: Tensor) -> float:
        return float((one.float() - other.float()).norm() / other.float().norm())

    assert error(reference["nvfp4"], reference["plain"]) > 0.05, "quantization must matter here"
    assert error(found["plain"], reference["plain"]) < 1e-5
    assert error(found["nvfp4"], reference["nvfp4"]) < 0.01


def test_ranks_that_hold_different_amax(live: LiveRanks) -> None:
    """The maximum is used for all members of the group, and the divergence is reported with its size."""
    report = live.report(tp=2)["divergent"]
    names = [f"model.layers.1.mlp.{p}_proj.input_quantizer._amax" for p in ("gate", "up")]
    assert report["divergent"] == {name: [2.0, 4.0] for name in names}
    assert len(report["warnings"]) == 1
    assert "2 amax differ between ranks" in report["warnings"][0]
    assert "2 to 4 (+100.0%)" in report["warnings"][0]
    tensors = tensors_in(live.at(tp=2) / "divergent")
    assert tensors["model.layers.1.mlp.up_proj.input_global_scale"].item() == 672.0


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nan", ["AmaxError", "layers.0.self_attn.o_proj.weight_quantizer._amax: inf"]),
        ("infinite", ["AmaxError", "layers.0.self_attn.o_proj.weight_quantizer._amax: inf"]),
        ("zero", ["AmaxError", "layers.0.self_attn.o_proj.weight_quantizer._amax: 0.0"]),
        ("missing", ["AmaxError", "layers.0.self_attn.o_proj.weight_quantizer._amax: missing"]),
        ("unmapped", ["UnmappedParameterError", "decoder.layers.0.strange.weight", "family=FILE.py"]),
    ],
)
def test_refusals_reach_every_rank_and_leave_nothing(live: LiveRanks, case: str, words: list[str]) -> None:
    message = live.report(tp=2)["errors"][case]
    assert all(word in message for word in words), message
    assert not [path.name for path in live.at(tp=2).iterdir() if path.name.startswith("refused")]


def test_config_is_what_the_engines_read(live: LiveRanks) -> None:
    config = json.loads((live.at(tp=2) / "nvfp4" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "nvfp4-pack-quantized"
    assert config["ignore"] == ["lm_head"]
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    known = {"num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"}
    assert set(group["weights"]) == known
    assert set(group["input_activations"]) == {*known, "scale_dtype"}
    assert group["input_activations"]["dynamic"] == "local"


def test_files_of_the_model_are_carried_over(live: LiveRanks) -> None:
    exported = live.at(tp=2) / "nvfp4"
    assert (exported / "tokenizer_config.json").read_bytes() == (live.hf / "tokenizer_config.json").read_bytes()
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_in(exported).keys() > {"model.norm.weight"}
    for name, file in index["weight_map"].items():
        with safe_open(exported / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a dictionary


def test_dequantized_weights_are_the_trained_ones(live: LiveRanks) -> None:
    source, exported = tensors_in(live.hf), tensors_in(live.at(tp=2) / "calibrated")
    modules = [name.removesuffix(".weight_packed") for name in exported if name.endswith(".weight_packed")]
    assert len(modules) == 2 * 7
    for name in modules:
        parts = ("weight_packed", "weight_scale", "weight_global_scale")
        found = dequantize(NVFP4Weight(*(exported[f"{name}.{part}"] for part in parts))).float()
        original = source[f"{name}.weight"].float()
        assert float((found - original).norm() / original.norm()) < 0.12, name
