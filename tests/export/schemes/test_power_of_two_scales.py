"""`fp8_block` with scales that are powers of two: the definition, and what vLLM makes of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amaxbridge.export import model_free_ptq
from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Code, amax_of_power_of_two
from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.schemes import SCHEMES, Groups, named_scheme
from amaxbridge.export.schemes.scheme import Scheme, quantize_tensors
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.hard_weights import random_weight

PLAIN, UE8M0 = SCHEMES["fp8_block"], named_scheme("fp8_block", scales="ue8m0")


def requantized_by_vllm(weight: Tensor) -> Tensor:
    """What vLLM's DeepGEMM path makes of a dequantized block: amax / 448, up to a power of two, codes, dequantized."""
    scale = torch.exp2(torch.ceil(torch.log2(weight.abs().amax().clamp(1e-4) / 448)))
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def tensors_of(scheme: Scheme, weight: Tensor, amax: GroupAmax | None = None) -> dict[str, Tensor]:
    return {name.removeprefix("m."): each for name, each in quantize_tensors(scheme, {"m": weight}, amax)}


def test_the_least_power_of_two_that_holds_the_amax() -> None:
    exponents = torch.exp2(torch.arange(-110, 110).float())
    edges = torch.tensor([1.0, 1.75, 448.0]).flatten()
    near = torch.cat([edges, edges.nextafter(edges * 2), edges.nextafter(edges * 0)])
    amax = (exponents[:, None] * near).flatten()
    found = amax_of_power_of_two(amax, Code.E4M3)
    scale = found / 448
    assert len(amax) == 220 * 9
    assert (torch.frexp(scale).mantissa == 0.5).all() and torch.equal(scale * 448, found)
    assert (amax <= found).all() and (amax > found / 2).all()
    unusable = torch.tensor([0.0, torch.inf])
    assert torch.equal(amax_of_power_of_two(unusable, Code.E4M3), unusable)
    assert amax_of_power_of_two(torch.tensor(torch.nan), Code.E4M3).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_are_the_weight_times_a_power_of_two(dtype: torch.dtype) -> None:
    weight = (random_weight(256, 384) * torch.logspace(-6, 3, 256)[:, None]).to(dtype)
    weight[:128, :128] = 0
    found = tensors_of(UE8M0, weight)
    assert found["weight_scale"].dtype == dtype
    scale = found["weight_scale"].float()
    assert (torch.frexp(scale).mantissa == 0.5).all()
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(found["weight"].float(), (weight.float() / spread).to(torch.float8_e4m3fn).float())
    amax = weight.float().abs().unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amax((1, 3))
    held = amax > 0
    assert ((amax <= 448 * scale) & (amax > 224 * scale))[held].all() and int(held.sum()) == 5


def test_vllm_rounds_nothing_twice() -> None:
    weight = random_weight(128, 128).bfloat16()
    once = UE8M0.dequantize(tensors_of(UE8M0, weight), torch.float32)
    assert torch.equal(requantized_by_vllm(once), once)
    plain = PLAIN.dequantize(tensors_of(PLAIN, weight), torch.float32)
    assert not torch.equal(requantized_by_vllm(plain), plain)


def test_calibrated_amax_are_rounded_up_too() -> None:
    weight, amax = random_weight(256, 128).bfloat16(), torch.tensor([[3.0], [0.9]])
    group = GroupAmax(None, torch.ones(()), Arithmetic.MODELOPT)
    found = UE8M0.quantize_rows(weight, group, BlockAmax(amax))
    assert found["weight_scale"].dtype == torch.float32
    assert found["weight_scale"].flatten().tolist() == [2.0**-7, 2.0**-8]  # 3.5 and 1.75 are 448 times these
    expected = (weight.float() / found["weight_scale"].repeat_interleave(128, 0)).clamp(-448, 448)
    assert torch.equal(found["weight"].float(), expected.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("name", "scales", "said"),
    [
        ("fp8_block", "e8m0", "unknown scales 'e8m0'; known: ue8m0"),
        ("fp8", "ue8m0", "scheme fp8 has scales of its own: ue8m0 is for fp8_block"),
        ("nvfp4", "ue8m0", "ue8m0 is for fp8_block"),
    ],
)
def test_scales_that_a_scheme_does_not_have(name: str, scales: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        named_scheme(name, scales=scales)


def test_an_interrupted_output_knows_its_scales() -> None:
    specs = {"m.weight": TensorSpec((128, 128), torch.bfloat16)}
    made = {Finalizer(specs, Groups.of(scheme), None).fingerprint for scheme in (PLAIN, UE8M0)}
    assert len(made) == 2


def test_a_directory(tmp_path: Path) -> None:
    """In both formats; the same config.json as without, and a source in FP8 blocks is quantized again, not kept."""
    (tmp_path / "hf").mkdir()
    weight = random_weight(256, 128).bfloat16()
    save_file({"model.layers.0.mlp.down_proj.weight": weight}, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    recipe = Groups.of(UE8M0)
    model_free_ptq(tmp_path / "hf", tmp_path / "plain", "fp8_block")
    for source, out, options in (
        ("hf", "out", {}),
        ("hf", "modelopt", {"format": "modelopt"}),
        ("plain", "again", {}),
        ("out", "kept", {}),
    ):
        model_free_ptq(tmp_path / source, tmp_path / out, recipe, **options)
    found = {
        name: load_file(next((tmp_path / name).glob("*.safetensors")))
        for name in ("plain", "out", "modelopt", "again", "kept")
    }
    scale = "model.layers.0.mlp.down_proj.weight_scale"
    assert (torch.frexp(found["plain"][scale].float()).mantissa != 0.5).any()
    for name in ("out", "modelopt", "again", "kept"):
        assert (torch.frexp(found[name][scale].float()).mantissa == 0.5).all(), name
    codes = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found["out"][codes].view(torch.uint8), found["modelopt"][codes].view(torch.uint8))
    assert torch.equal(found["out"][codes].view(torch.uint8), found["kept"][codes].view(torch.uint8))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
