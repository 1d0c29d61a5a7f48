"""Weights stored as FP8 codes and scales, exported dequantized or unchanged, bit for bit, through TP, QKV, gate/up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import tensors_in
from tests.support.hf_models import make_qwen3_moe
from tests.support.launcher import Launcher, LiveRanks
from tests.support.stored_codes import quantize_in_blocks, quantize_mx

SIZES = [{"tp": 1}, {"tp": 2}]
QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def blocks(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """A model that is cut between blocks only; the magnitude of the values differs from block to block."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("blocks")
    torch.manual_seed(23)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            rows, columns = (torch.arange(size) // 128 for size in parameter.shape)
            parameter.data *= torch.exp2(-((rows[:, None] + 3 * columns) % 5).float())
    model.bfloat16().save_pretrained(directory)
    return LiveRanks(launch, "live_codes.py", directory, tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def experts(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "num_hidden_layers": 1,
        "num_experts": 4,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    }
    directory = make_qwen3_moe(tmp_path_factory.mktemp("experts"), sizes)
    return LiveRanks(launch, "live_codes.py", directory, tmp_path_factory.mktemp("codes_of_experts"))


@pytest.fixture(scope="module")
def cut(launch: Launcher, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    live = LiveRanks(launch, "live_codes.py", qwen3, tmp_path_factory.mktemp("cut"))
    return outcomes(live.at(tp=1))


def outcomes(directory: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / "outcomes.json").read_text())
    return found


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("form", "quantize"), [("InBlocks", quantize_in_blocks), ("MX", quantize_mx)])
def test_codes_and_scales_are_written_as_they_are(
    blocks: LiveRanks, sizes: dict[str, int], form: str, quantize: Any
) -> None:
    assert checked(blocks.at(**sizes), tensors_in(blocks.hf), form, quantize) == 7


@pytest.mark.parametrize(("form", "quantize"), [("InBlocks", quantize_in_blocks), ("MX", quantize_mx)])
def test_codes_of_experts(experts: LiveRanks, form: str, quantize: Any) -> None:
    """Four experts on two ranks."""
    directory = experts.at(processes=2, tp=1, ep=2)
    assert checked(directory, tensors_in(experts.hf), form, quantize) == 4 + 4 * 3


def checked(directory: Path, source: dict[str, Tensor], form: str, quantize: Any) -> int:
    """Checks that weights have the codes and scales of their own quantization; returns how many there are."""
    assert outcomes(directory)[form] == ""
    found, seen = tensors_in(directory / form / "auto"), 0
    for name, weight in source.items():
        if module_kind(name) not in QUANTIZED:
            assert same(found[name], weight), name
            continue
        codes, scales = quantize(weight)
        assert same(found[name], codes), name
        assert same(found[f"{name}_scale"], scales), name
        seen += 1
    assert len(found) == len(source) + seen
    return seen


@pytest.mark.parametrize("form", ["InBlocks", "MX", "InRows", "OneScale"])
def test_without_a_scheme_they_are_dequantized(blocks: LiveRanks, form: str) -> None:
    """TP=2 gives the same weights wherever the scale does not depend on the cut."""
    found, source = tensors_in(blocks.at(tp=1) / form / "plain"), tensors_in(blocks.hf)
    assert found.keys() == source.keys()
    for name, weight in source.items():
        assert found[name].dtype == torch.bfloat16
        error = (found[name].float() - weight.float()).abs().max()
        assert error <= weight.abs().max() / (16 if module_kind(name) in QUANTIZED else torch.inf), name
    if form != "OneScale":
        other = tensors_in(blocks.at(tp=2) / form / "plain")
        assert all(same(found[name], other[name]) for name in found)


def test_dequantized_values_are_codes_times_scales(blocks: LiveRanks) -> None:
    directory = blocks.at(tp=2) / "InBlocks"
    kept, plain = tensors_in(directory / "auto"), tensors_in(directory / "plain")
    name = "model.layers.0.mlp.up_proj.weight"
    scales = kept[f"{name}_scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal((kept[name].float() * scales).bfloat16(), plain[name])


def test_config_says_what_engines_run(blocks: LiveRanks) -> None:
    for form, dynamic in (("InBlocks", 128), ("MX", 32)):
        config = json.loads((blocks.at(tp=2) / form / "auto" / "config.json").read_text())["quantization_config"]
        (group,) = config["config_groups"].values()
        assert group["input_activations"]["dynamic"] is True
        assert group["input_activations"]["group_size"] == dynamic


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("InRows", "128 elements of a row"),
        ("Swizzled", "in the order of a kernel"),
        ("OneScale", "one scale for the whole tensor"),
        ("Gradients", "codes other than E4M3"),
    ],
)
def test_what_no_scheme_writes_is_named(blocks: LiveRanks, form: str, why: str) -> None:
    said = outcomes(blocks.at(tp=2))[form]
    assert said.startswith("UsageError: scheme=auto: 8 parameters")  # of four linears, on each of two ranks
    assert f"decoder.layers.0.mlp.linear_fc1.weight: {form} has" in said
    assert why in said
    assert "scheme=none writes them dequantized" in said


def test_ignored_weights_are_dequantized(blocks: LiveRanks) -> None:
    assert outcomes(blocks.at(tp=2))["ignored"] == ""
    found = tensors_in(blocks.at(tp=2) / "ignored")
    plain = tensors_in(blocks.at(tp=2) / "InBlocks" / "plain")
    assert same(found["model.layers.0.self_attn.q_proj.weight"], plain["model.layers.0.self_attn.q_proj.weight"])
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


def test_blocks_that_a_cut_divides_are_refused(cut: dict[str, str]) -> None:
    said = cut["InBlocks"]
    assert said.startswith("MappingError")
    assert "model.layers.0.self_attn.q_proj.weight" in said
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in said
    assert "scheme=fp8_block quantizes the dequantized weights to new blocks" in said
    assert cut["MX"] == ""  # blocks of one row are never divided


def test_they_are_quantized_again_on_request(cut: dict[str, str]) -> None:
    assert cut["again"] == ""


def test_a_refit_has_the_same_tensors(blocks: LiveRanks) -> None:
    directory = blocks.at(tp=2)
    found: dict[str, Tensor] = {}
    for rank in range(2):
        found |= torch.load(directory / f"refit_{rank}.pt")
    saved = tensors_in(directory / "InBlocks" / "auto")
    assert found.keys() == saved.keys()
    assert all(same(found[name].reshape(saved[name].shape), saved[name]) for name in saved)


def test_a_state_of_quantizers_is_refused(blocks: LiveRanks) -> None:
    assert "quant_state=True" in outcomes(blocks.at(tp=2))["state"]


def test_weights_are_imported_into_codes(blocks: LiveRanks) -> None:
    directory = blocks.at(tp=2)
    found, plain = tensors_in(directory / "imported"), tensors_in(directory / "InBlocks" / "plain")
    assert all(same(found[name], plain[name]) for name in plain)


def module_kind(name: str) -> str:
    return name.split(".")[-2]
