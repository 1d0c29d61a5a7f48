"""Exports in ModelOpt's format against ModelOpt's own exporter, tensor by tensor; and the way back, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import tensors_in
from tests.support.hf_models import make_qwen3, make_qwen3_moe
from tests.support.launcher import Launcher, LiveRanks
from tests.workers.live_modelopt import CASES, DENSE_ONLY, NAMED

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 2,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "mlp_only_layers": [0],
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    # two ranks have whole blocks of MXFP8
    make_qwen3(hf := tmp_path_factory.mktemp("dense_model"), intermediate_size=128)
    return LiveRanks(launch, "live_modelopt.py", hf, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    hf = make_qwen3_moe(tmp_path_factory.mktemp("moe_model"), SIZES)
    return LiveRanks(launch, "live_modelopt.py", hf, tmp_path_factory.mktemp("moe"))


@pytest.fixture(params=["dense", "moe"])
def made(request: pytest.FixtureRequest) -> Path:
    live: LiveRanks = request.getfixturevalue(request.param)
    return live.at(tp=1)


def same_bits(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def config_of(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize("case", ["nvfp4", "nvfp4a16"])
def test_every_tensor_is_modelopts(made: Path, case: str) -> None:
    ours, theirs = tensors_in(made / case), tensors_in(made / f"{case}_modelopt")
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    assert [name for name, tensor in ours.items() if not same_bits(tensor, theirs[name])] == []


def test_fp8_differs_where_modelopts_exporter_rounds_in_bf16(made: Path) -> None:
    """Its exporter divides by the scale in the weight's dtype; its fake quantizer, in training, in fp32, as ours."""
    ours, theirs = tensors_in(made / "fp8"), tensors_in(made / "fp8_modelopt")
    plain = tensors_in(made / "fp8_compressed")
    cache = {name: name.replace(f".{name[-7]}_proj.", ".") for name in ours if name.endswith(("k_scale", "v_scale"))}
    assert len(cache) == 4  # in the names of ModelOpt's exporter of Hugging Face models; Megatron's also clamps to 1
    assert {cache.get(name, name) for name in ours} == theirs.keys()
    seen = 0
    for name, tensor in ours.items():
        if name in cache:
            assert same_bits(tensor.reshape(1), plain[cache[name]])
        elif name.endswith("_scale"):
            assert same_bits(tensor, theirs[name].reshape(()))
        elif tensor.dtype == torch.float8_e4m3fn:
            seen += 1
            assert same_bits(tensor, plain[name])
            apart = (tensor.float() - theirs[name].float()).abs()
            assert (apart <= 2**-2 * tensor.float().abs().clamp(min=2**-6)).all()
            assert ((apart > 0).float().mean() < 0.1).item()
        else:
            assert same_bits(tensor, theirs[name])
    assert seen >= 14


def test_the_configs_say_what_modelopts_say(made: Path) -> None:
    """Excluded are the same linear modules; ModelOpt lists each, and its own order is not kept."""
    for case in CASES:
        ours, theirs = (
            json.loads((made / each / "hf_quant_config.json").read_text()) for each in (case, f"{case}_modelopt")
        )
        assert ours["producer"] == theirs["producer"]
        said, asked = ours["quantization"], theirs["quantization"]
        for key in ("quant_algo", "kv_cache_quant_algo", "group_size"):
            assert said.get(key) == asked.get(key), key
        assert "lm_head" in said["exclude_modules"]
        assert set(said["exclude_modules"]) - set(asked["exclude_modules"]) <= {"lm_head"}
        in_config, expected = config_of(made / case), config_of(made / f"{case}_modelopt")
        assert {**in_config, "ignore": None} == {**expected, "ignore": None}


def test_the_codes_are_those_of_compressed_tensors(made: Path) -> None:
    ours, plain = tensors_in(made / "nvfp4"), tensors_in(made / "nvfp4_compressed")
    modules = [name.removesuffix(".weight_scale_2") for name in ours if name.endswith(".weight_scale_2")]
    assert len(modules) >= 14
    for module in modules:
        assert same_bits(ours[f"{module}.weight"], plain[f"{module}.weight_packed"])
        assert same_bits(ours[f"{module}.weight_scale"], plain[f"{module}.weight_scale"])
        assert same_bits(1 / ours[f"{module}.weight_scale_2"].reshape(1), plain[f"{module}.weight_global_scale"])
        assert same_bits(1 / ours[f"{module}.input_scale"].reshape(1), plain[f"{module}.input_global_scale"])


def test_the_way_back_gives_the_same_files(dense: LiveRanks, moe: LiveRanks) -> None:
    """Imported into Megatron and exported again: weights, amax, quantizers and the cache's scales survive."""
    seen = 0
    for live, cases in ((dense, [*CASES, *DENSE_ONLY]), (moe, [*CASES])):
        for case in cases:
            first, again = live.at(tp=1) / case, live.at(tp=1) / f"{case}_again"
            one, other = tensors_in(first), tensors_in(again)
            assert one.keys() == other.keys()
            assert [name for name, tensor in one.items() if not same_bits(tensor, other[name])] == []
            assert config_of(first) == config_of(again)
            seen += 1
    assert seen == 8


def test_tensor_parallel_ranks_write_the_same(dense: LiveRanks) -> None:
    """ModelOpt's own exporter does not work there."""
    for case in (*CASES, *DENSE_ONLY):
        assert_same_files(dense.at(tp=1) / case, dense.at(tp=2) / case)


MESHES = {
    "EP=2": {"tp": 1, "ep": 2},
    "PP=2": {"tp": 1, "pp": 2},
    "TP=2": {"tp": 2},
    "TP=2, EP=2": {"tp": 2, "ep": 2, "etp": 1},
}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_mesh_of_experts_writes_the_same(sizes: dict[str, int], moe: LiveRanks) -> None:
    assert_same_files(moe.at(tp=1) / NAMED, moe.at(processes=2, **sizes) / NAMED)


def assert_same_files(one: Path, other: Path) -> None:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    assert {"config.json", "hf_quant_config.json", "model.safetensors"} <= names
    assert [name for name in sorted(names) if (one / name).read_bytes() != (other / name).read_bytes()] == []
