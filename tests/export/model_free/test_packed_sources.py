"""Quantized packed experts: GPT-OSS's MXFP4 and FP8 blocks, one expert at a time; and Kimi's INT4, declared inside."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.export import model_free_ptq
from amaxbridge.export.dequantized import open_dequantized
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.schemes import SCHEMES, Groups, named_scheme
from amaxbridge.mappings.errors import UsageError
from tests.support import quantized_sources as held
from tests.support.checkpoints import MOE, dense_model, moe_model, tensors_of, write_checkpoint
from tests.support.hard_weights import of_module
from tests.support.in_memory import expected, same

VL_MOE = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_experts": 4},
}
GPT_OSS = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 64, "num_local_experts": 3}
EXPERTS, HIDDEN, FFN = 3, 64, 96


def gpt_oss(layers: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Stored tensors; and what they mean in bf16, with experts one by one, and packed as transformers has them."""
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    stored, single, packed = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    around = {f"{name}.weight": weight(32, HIDDEN).bfloat16() for name in ("model.embed_tokens", "lm_head")}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        around |= {f"{at}.self_attn.{name}_proj.weight": weight(64, HIDDEN).bfloat16() for name in "qkvo"}
        around[f"{at}.mlp.router.weight"] = weight(EXPERTS, HIDDEN).bfloat16()
        for part, rows, columns in (("gate_up_proj", 2 * FFN, HIDDEN), ("down_proj", HIDDEN, FFN)):
            name, bias = f"{at}.mlp.experts.{part}", weight(EXPERTS, rows).bfloat16()
            each = [held.mxfp4(weight(rows, columns), names=("blocks", "scales"), blocks=True) for _ in range(EXPERTS)]
            stored |= {f"{name}_{end}": torch.stack([one.tensors[end] for one in each]) for end in ("blocks", "scales")}
            stored[f"{name}_bias"] = packed[f"{name}_bias"] = bias
            packed[name] = torch.stack([one.weight.bfloat16().t() for one in each])
            for expert, one in enumerate(each):
                halves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
                for half, rows_of in halves.items() if part == "gate_up_proj" else [("down_proj", slice(None))]:
                    module = f"{at}.mlp.experts.{expert}.{half}"
                    single[f"{module}.weight"] = one.weight.bfloat16()[rows_of].contiguous()
                    single[f"{module}.bias"] = bias[expert][rows_of].contiguous()
    return stored | around, single | around, packed | around


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
@pytest.mark.parametrize("converter", [None, "gpt_oss"])
def test_gpt_oss_dequantized(declared: bool, converter: str | None, tmp_path: Path) -> None:
    stored, single, packed = gpt_oss()
    config = GPT_OSS | ({"quantization_config": {"quant_method": "mxfp4"}} if declared else {})
    cuts = [name for name in stored if name.endswith("1.mlp.experts.gate_up_proj_scales")]
    source = write_checkpoint(tmp_path / "in", stored, cuts=cuts, config=config)
    model_free_ptq(source, tmp_path / "out", "fp8_dynamic", converter=converter, verify=False)
    recipe = Groups.of(SCHEMES["fp8_dynamic"], ["re:.*router$", "lm_head"])
    same(tensors_of(tmp_path / "out"), expected(single, recipe))
    for scheme in ("none", "fp8_dynamic"):
        ignore = ["re:.*experts.*"] if scheme != "none" else []
        model_free_ptq(source, tmp_path / scheme, scheme, ignore, verify=False)
        found = tensors_of(tmp_path / scheme)
        same(
            {name: found[name] for name in found if "experts" in name},
            {n: t for n, t in packed.items() if "experts" in n},
        )


@pytest.mark.parametrize("scheme", ["mxfp4a16", "nvfp4a16"])
def test_gpt_oss_kept(scheme: str, tmp_path: Path) -> None:
    """MXFP4 as it is, and as NVFP4 without loss of value; plain linears are quantized beside it."""
    stored, single, _ = gpt_oss()
    source = write_checkpoint(tmp_path / "in", stored, config=GPT_OSS)
    report = model_free_ptq(source, tmp_path / "out", scheme, verify=False)
    found = tensors_of(tmp_path / "out")
    assert len(report.kept) == 2 * EXPERTS * 3
    assert len(report.quantized) == len(report.kept) + 8
    for module in report.kept:
        weight = SCHEMES[scheme].dequantize(of_module(module, found))
        assert torch.equal(weight, single[f"{module}.weight"]), module
        assert torch.equal(found[f"{module}.bias"], single[f"{module}.bias"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(config["config_groups"]) == ["group_0"]


def test_gpt_oss_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, _, _ = gpt_oss(1)
    source = write_checkpoint(tmp_path / "in", stored, config=GPT_OSS)
    model_free_ptq(source, tmp_path / "out", "none", verify=False)
    found = tensors_of(tmp_path / "out")
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(found[name], theirs)


@pytest.mark.parametrize("scheme", ["none", "mxfp8", "fp8_block"])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_fp8_in_packed_experts(scheme: str, inputs_first: bool, tmp_path: Path) -> None:
    """Codes `[experts, out, in]` as transformers saves them, or `[experts, in, out]`; and scales of the same dims."""
    plain = moe_model(packed=True)
    if inputs_first:
        plain = {
            name.replace("model.", "model.language_model.", 1): each.mT.contiguous() if each.ndim == 3 else each
            for name, each in plain.items()
        }
    stored, meant, one_by_one = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in plain.items():
        if tensor.ndim != 3:
            stored[name] = meant[name] = one_by_one[name] = tensor
            continue
        each = [held.blocks_of_fp8(expert) for expert in tensor]
        stored[name] = torch.stack([one.tensors["weight"] for one in each])
        stored[f"{name}_scale_inv"] = torch.stack([one.tensors["weight_scale_inv"] for one in each])
        meant[name] = torch.stack([one.weight.bfloat16() for one in each])
        for expert, one in enumerate(each):
            experts, _, part = name.rpartition(".")
            parts = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {"down_proj": 0}
            weight = one.weight.t() if inputs_first else one.weight
            halves = weight.bfloat16().chunk(len(parts))
            one_by_one |= {f"{experts}.{expert}.{half}.weight": halves[at].contiguous() for half, at in parts.items()}
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**(VL_MOE if inputs_first else MOE), "quantization_config": fp8}
    source = write_checkpoint(tmp_path / "in", stored, config=config)
    report = model_free_ptq(source, tmp_path / "out", scheme)
    assert not report.kept
    recipe = None if scheme == "none" else Groups.of(SCHEMES[scheme], ["re:.*mlp\\.gate$", "lm_head"])
    same(tensors_of(tmp_path / "out"), meant if recipe is None else expected(one_by_one, recipe))
    if scheme == "none":  # and on the way into training, where experts are single
        with SafetensorsCheckpoint(source) as checkpoint:
            weights = open_dequantized(checkpoint, config)
            same({name: weights.read(name) for name in one_by_one}, one_by_one)
            assert len(weights.schemes) + len(weights.dequantized) == sum(".experts." in name for name in one_by_one)


@pytest.mark.parametrize("converter", [None, "kimi_int4", "compressed_tensors"])
def test_int4_of_kimi(converter: str | None, tmp_path: Path) -> None:
    """compressed-tensors, declared in text_config, with names that begin with `language_model.` in the files alone."""
    scheme = named_scheme("w4a16", 32)
    write_checkpoint(tmp_path / "plain", dense_model(1))
    model_free_ptq(tmp_path / "plain", tmp_path / "served", Groups.of(scheme))
    stored = {f"language_model.{name}": tensor for name, tensor in tensors_of(tmp_path / "served").items()}
    said = json.loads((tmp_path / "served" / "config.json").read_text())["quantization_config"]
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": {"quantization_config": said}}
    source = write_checkpoint(tmp_path / "in", stored, config=config)
    report = model_free_ptq(source, tmp_path / "out", "mxfp8", converter=converter, architecture="guess", verify=False)
    meant = {
        name: scheme.dequantize(of_module(name.removesuffix(".weight"), tensors_of(tmp_path / "served")))
        if "_proj" in name
        else tensor
        for name, tensor in dense_model(1).items()
    }
    wanted = expected({f"language_model.{name}": tensor for name, tensor in meant.items()}, "mxfp8")
    same(tensors_of(tmp_path / "out"), wanted)
    assert "pack-quantized" not in (tmp_path / "out" / "config.json").read_text()
    kept = model_free_ptq(
        source, tmp_path / "kept", Groups.of(scheme), converter=converter, architecture="guess", verify=False
    )
    assert len(kept.kept) == len(report.quantized) == 7
    same(tensors_of(tmp_path / "kept"), stored)


def test_kimi_is_in_groups_of_32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", dense_model(1))
    model_free_ptq(tmp_path / "plain", tmp_path / "served", "w4a16")
    with pytest.raises(UsageError, match="INT4 in groups of 32"):
        model_free_ptq(tmp_path / "served", tmp_path / "out", "mxfp8", converter="kimi_int4")


CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": "NVFP4"},
}


@pytest.mark.parametrize("cache", CACHES)
def test_scales_of_a_cache(cache: str, tmp_path: Path) -> None:
    """FP8's are kept, under the names that engines know; others are refused."""
    stored = dict[str, Tensor]()
    for name, tensor in dense_model(1).items():
        module = name.removesuffix(".weight")
        made = held.fp8_per_tensor(tensor).tensors if name.endswith("_proj.weight") else {"weight": tensor}
        stored |= {f"{module}.{local}": each for local, each in made.items()}
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            stored[f"{module}.{module[-6]}_scale"] = torch.tensor(0.5)
    source = write_checkpoint(tmp_path / "in", stored, config={**MOE, "quantization_config": CACHES[cache]})
    if cache != "fp8":
        with pytest.raises(UsageError, match="key-value cache in NVFP4"):
            model_free_ptq(source, tmp_path / "out", "mxfp8")
        return
    model_free_ptq(source, tmp_path / "out", "mxfp8")
    found = tensors_of(tmp_path / "out")
    assert [found[f"model.layers.0.self_attn.{letter}_scale"].tolist() for letter in "kv"] == [[0.5], [0.5]]
    assert not any("k_proj.k_scale" in name for name in found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
