"""`format=modelopt` of a directory: from plain weights, and to and from compressed-tensors, values unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.export import model_free_ptq
from amaxbridge.export.quant_config import read_quant_config
from amaxbridge.export.schemes import SCHEMES, Groups, SchemeGroup, modelopt_schemes, named_scheme
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import UsageError
from tests.export.model_free.test_quantized_sources import DENSE, source_of
from tests.support import quantized_sources as held
from tests.support.checkpoints import dense_model, tensors_in, write_checkpoint

BESIDE = "hf_quant_config.json"
WRITTEN = [scheme.name for scheme in modelopt_schemes()]
WITHOUT_DATA = [name for name in WRITTEN if not SCHEMES[name].needs_input_amax]
QUANTIZED = 7
GATE_UP = ("mlp.gate", "mlp.up")


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def said_by(directory: Path) -> tuple[Any, Any]:
    names = ("config.json", "hf_quant_config.json")
    config, beside = (json.loads((directory / name).read_text()) for name in names)
    return config["quantization_config"], beside["quantization"]


@pytest.mark.parametrize("scheme", WITHOUT_DATA)
def test_values_are_those_of_compressed_tensors(scheme: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", dense_model(1), config=DENSE)
    served = not scheme.startswith("mxfp4")  # ModelOpt's name for both does not say if inputs are quantized
    for name in ("modelopt", "compressed-tensors"):
        model_free_ptq(source, tmp_path / name, scheme, format=name, verify=served)
    stored, plain = tensors_in(tmp_path / "modelopt"), tensors_in(tmp_path / "compressed-tensors")
    config = read_quant_config(said_by(tmp_path / "modelopt")[0]).checked()
    seen = 0
    for module in (name.removesuffix(".weight") for name in stored if name.endswith("_proj.weight")):
        local = {name.removeprefix(f"{module}."): each for name, each in stored.items() if name.startswith(module)}
        other = {name.removeprefix(f"{module}."): each for name, each in plain.items() if name.startswith(module)}
        found = config.scheme_of(module)
        assert found is not None
        assert found.name == (scheme if served else "mxfp4a16")
        assert bits(local["weight"]) == bits(other[SCHEMES[scheme].codes])
        assert torch.equal(found.dequantize(local), SCHEMES[scheme].dequantize(other))
        seen += 1
    assert seen == QUANTIZED
    report = verify(tmp_path / "modelopt")
    assert report.verdict_of("vllm").serves == served
    assert not report.verdict_of("transformers").serves
    assert not report.verdict_of("runtime").serves
    assert "in the modelopt format" in (tmp_path / "modelopt" / "README.md").read_text()
    measured = verify(tmp_path / "modelopt", reference=source).errors  # its scales of whole tensors have no dims
    assert [each.error for each in measured] == [
        each.error for each in verify(tmp_path / "compressed-tensors", reference=source).errors
    ]
    assert len(measured) == QUANTIZED


@pytest.mark.parametrize("spelled", ["both", "beside", "in config.json"])
def test_to_compressed_tensors_and_back(spelled: str, tmp_path: Path) -> None:
    """Multipliers survive bit for bit from ModelOpt's format to itself; codes and block scales on every way."""
    source, stored, _ = source_of(tmp_path / "in", held.nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    cache = {f"model.layers.0.self_attn.{each}_proj.{each}_scale": torch.tensor(0.3) for each in "kv"}
    stored |= cache
    declared = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head*"]}
    in_config = {"quantization_config": {**declared, "quant_method": "modelopt"}} if spelled != "beside" else {}
    source = write_checkpoint(tmp_path / "given", stored, config={**DENSE, **in_config})
    if spelled != "in config.json":
        (source / "hf_quant_config.json").write_text(json.dumps({"quantization": declared}))
    same = model_free_ptq(source, tmp_path / "same", "nvfp4", format="modelopt")
    assert len(same.kept) == QUANTIZED
    found = tensors_in(tmp_path / "same")
    assert {name: bits(each) for name, each in found.items()} == {name: bits(each) for name, each in stored.items()}
    there = model_free_ptq(source, tmp_path / "there", "nvfp4")
    assert len(there.kept) == QUANTIZED
    plain = tensors_in(tmp_path / "there")
    assert plain["model.layers.0.self_attn.k_scale"].item() == cache["model.layers.0.self_attn.k_proj.k_scale"].item()
    back = model_free_ptq(tmp_path / "there", tmp_path / "back", "nvfp4", format="modelopt")
    assert len(back.kept) == QUANTIZED
    again = tensors_in(tmp_path / "back")
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        if name.endswith(("weight_scale_2", "input_scale")):
            assert bits((1 / tensor).reshape(1)) == bits(plain[_divisor(name)])
            torch.testing.assert_close(again[name], tensor.reshape(()), rtol=2**-22, atol=0)
        else:
            assert bits(again[name]) == bits(tensor), name
    assert said_by(tmp_path / "back") == said_by(tmp_path / "same")
    assert said_by(tmp_path / "back")[1]["kv_cache_quant_algo"] == "FP8"


def _divisor(name: str) -> str:
    return name.replace("weight_scale_2", "weight_global_scale").replace("input_scale", "input_global_scale")


def test_several_schemes_are_mixed_precision(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", dense_model(1), config=DENSE)
    recipe = Groups(
        (
            SchemeGroup(named_scheme("nvfp4a16"), (r"re:.*\.mlp\..*",)),
            SchemeGroup(named_scheme("fp8_dynamic"), ("Linear",)),
        )
    )
    model_free_ptq(source, tmp_path / "out", recipe, format="modelopt")
    in_config, beside = said_by(tmp_path / "out")
    assert beside["quant_algo"] == in_config["quant_algo"] == "MIXED_PRECISION"
    assert beside["quantized_layers"] == in_config["quantized_layers"]
    kinds = [layer["quant_algo"] for layer in beside["quantized_layers"].values()]
    assert sorted(kinds) == ["FP8_PER_CHANNEL_PER_TOKEN"] * 4 + ["W4A16_NVFP4"] * 3
    assert verify(tmp_path / "out").verdict_of("vllm").serves
    in_sglang = wrong_in(tmp_path / "out", "sglang")  # whose model class does not say what qkv_proj is made of
    fused = [f"model.layers.0.{name}_proj" for name in (*GATE_UP, "self_attn.q", "self_attn.k", "self_attn.v")]
    assert in_sglang.keys() == {"engine-schemes", "quantized-is-targeted"}
    assert sorted(in_sglang["quantized-is-targeted"]) == sorted(fused)


def test_sglang_does_not_know_mixed_precision_without_nvfp4(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", dense_model(1), config=DENSE)
    schemes = (("mxfp8", r"re:.*\.mlp\..*"), ("fp8_block", "Linear"))
    recipe = Groups(tuple(SchemeGroup(named_scheme(scheme), (target,)) for scheme, target in schemes))
    model_free_ptq(source, tmp_path / "out", recipe, format="modelopt")
    assert verify(tmp_path / "out").verdict_of("vllm").serves
    assert "quant_algo" in wrong_in(tmp_path / "out", "sglang")["engine-schemes"]


def test_vllm_takes_an_excluded_name_for_a_part_of_others(tmp_path: Path) -> None:
    """`mlp.gate`, a router's name, is a part of `mlp.gate_up_proj`, which vLLM then builds in 16 bits."""
    source = write_checkpoint(tmp_path / "in", dense_model(1), config=DENSE)
    model_free_ptq(source, tmp_path / "out", "nvfp4a16", format="modelopt")
    assert wrong_in(tmp_path / "out", "vllm") == wrong_in(tmp_path / "out", "sglang") == {}
    for file, parts in (
        ("config.json", ("quantization_config", "ignore")),
        (BESIDE, ("quantization", "exclude_modules")),
    ):
        said = json.loads((tmp_path / "out" / file).read_text())
        said[parts[0]][parts[1]].append("model.layers.0.mlp.gate")
        (tmp_path / "out" / file).write_text(json.dumps(said))
    gate_up = [f"model.layers.0.{name}_proj" for name in GATE_UP]
    assert wrong_in(tmp_path / "out", "vllm") == {"quantized-is-targeted": gate_up}
    assert wrong_in(tmp_path / "out", "sglang") == {}


def wrong_in(directory: Path, engine: str) -> dict[str, list[str]]:
    """Rule → the places where an engine alone does not hold it."""
    found = {
        finding.rule: [each.subject for each in finding.problems if each.engine == engine]
        for finding in verify(directory).findings
    }
    return {rule: places for rule, places in found.items() if places}


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in WRITTEN])
def test_a_scheme_without_a_counterpart_is_refused_by_name(scheme: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", dense_model(1), config=DENSE)
    with pytest.raises(UsageError, match=f"{scheme} has no counterpart in ModelOpt's format"):
        model_free_ptq(source, tmp_path / "out", scheme, format="modelopt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "name", "message"),
    [("none", "modelopt", "scheme=none writes plain ones"), ("mxfp8", "gguf", "unknown format=gguf; known")],
)
def test_a_format_that_cannot_be(scheme: str, name: str, message: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", dense_model(1), config=DENSE)
    with pytest.raises(UsageError, match=message):
        model_free_ptq(source, tmp_path / "out", scheme, format=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_algo": "W4A8_AWQ"}, "quant_algo is W4A8_AWQ; known"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers is no object of layers"),
        ({"pre_quant_scale": True}, "pre_quant_scale is true"),
        ({"kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo is INT8"),
        ({"ignore": "lm_head"}, "ignore is not a list"),
        ({"rotation": "hadamard"}, "rotation is an unknown key"),
    ],
)
def test_a_config_that_is_not_understood(change: dict[str, Any], message: str) -> None:
    raw = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], **change}
    with pytest.raises(UsageError, match=message):
        read_quant_config(raw).checked()
