"""Weights that quantize to the bytes they were dequantized from, and amax that make the scales they came from."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import amax_of_divisor, amax_of_scale
from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax
from amaxbridge.export.dequantized import DequantizedCheckpoint
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.restore import restore_nvfp4
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.quant_config import read_quant_config
from amaxbridge.export.schemes import SCHEMES, Scheme
from amaxbridge.export.schemes.scheme import quantize_tensors
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import CheckpointError, UsageError
from tests.support.hard_weights import (
    WEIGHTS,
    all_arithmetics,
    all_dtypes,
    assert_same_weight,
    same_bytes,
    weights_of_all_kinds,
)

factors = pytest.mark.parametrize("factor", [1.0, 0.25, 40.0, 3000.0])


def there_and_back(weight: Tensor, amax: Tensor, arithmetic: Arithmetic) -> tuple[nvfp4.NVFP4Weight, nvfp4.NVFP4Weight]:
    stored = nvfp4.quantize(weight, amax, arithmetic=arithmetic)
    restored = amax_of_divisor(stored.global_scale)
    values = restore_nvfp4(stored, restored / torch.full_like(restored, 2688.0))
    return stored, nvfp4.quantize(values, restored, arithmetic=Arithmetic.MODELOPT)


@weights_of_all_kinds
@all_dtypes
@factors
def test_what_modelopt_wrote_comes_back(kind: str, dtype: torch.dtype, factor: float) -> None:
    """Small and clipped blocks, negatives that round to zero, blocks that round to zeros."""
    weight = WEIGHTS[kind]().to(dtype)
    amax = nvfp4.tensor_amax([weight], arithmetic=Arithmetic.MODELOPT) * factor
    stored, again = there_and_back(weight, amax, Arithmetic.MODELOPT)
    assert_same_weight(again, stored)


@weights_of_all_kinds
@factors
def test_codes_of_llm_compressor_come_back(kind: str, factor: float) -> None:
    """Its scale of a block of zeros is another than ModelOpt's, and some global scales no amax makes."""
    weight = WEIGHTS[kind]().bfloat16()
    amax = nvfp4.tensor_amax([weight], arithmetic=Arithmetic.COMPRESSED_TENSORS) * factor
    stored, again = there_and_back(weight, amax, Arithmetic.COMPRESSED_TENSORS)
    assert torch.equal(again.packed, stored.packed)
    zeros = (stored.packed & 0x77).unflatten(1, (-1, 8)).eq(0).all(-1)
    assert torch.equal(again.block_scale.float()[~zeros], stored.block_scale.float()[~zeros])
    torch.testing.assert_close(again.global_scale, stored.global_scale, rtol=2**-23, atol=0)


@all_arithmetics
def test_smallest_numbers_change_no_value(arithmetic: Arithmetic) -> None:
    weight = WEIGHTS["zeros"]()
    stored, again = there_and_back(weight, weight.abs().max() * 3000, arithmetic)
    assert torch.equal(nvfp4.dequantize(again), nvfp4.dequantize(stored))


def test_amax_make_their_scales_again() -> None:
    amax = torch.rand(2000, generator=torch.Generator().manual_seed(3)) * 10 + 1e-3
    for divisor in (amax / torch.full_like(amax, 2688.0)).reciprocal()[:500]:
        assert torch.equal(nvfp4.input_global_scale(amax_of_divisor(divisor)), divisor.reshape(1))
    for bound in (448.0, 127.0, 7.0):
        scales = amax / torch.full_like(amax, bound)
        assert torch.equal(amax_of_scale(scales, bound) / torch.full_like(amax, bound), scales)


def save(directory: Path, scheme: Scheme, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A directory as an export writes it."""
    from safetensors.torch import save_file

    group = GroupAmax(None, torch.tensor(3.3))
    tensors = dict(quantize_tensors(scheme, weights, group))
    save_file({**tensors, "norm.weight": torch.ones(4)}, directory / "model.safetensors")
    config = {"quantization_config": quantization_config(dict.fromkeys(weights, scheme), ["lm_head"])}
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def opened(directory: Path) -> DequantizedCheckpoint:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return DequantizedCheckpoint(SafetensorsCheckpoint(directory), config)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.format])
def test_every_scheme_comes_back(name: str, tmp_path: Path) -> None:
    """From the directory alone: its weights, quantized again with the amax of its scales, give its tensors."""
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(5)
    modules = ("a.q_proj", "a.k_proj")
    weights = {module: torch.randn(256, 256, generator=generator).bfloat16() for module in modules}
    tensors = save(tmp_path, scheme, weights)
    source = opened(tmp_path)
    assert {module: each.name for module, each in source.schemes.items()} == dict.fromkeys(weights, name)
    again = {module: source.read(f"{module}.weight") for module in weights}
    assert not source.changed, source.changed
    state = source.state
    amax = {module: state.amax.get(module + WEIGHT_QUANTIZER) for module in weights}
    blocks = {m: BlockAmax(each) for m, each in amax.items() if each is not None and each.numel() > 1}
    one = None if blocks else amax["a.q_proj"]
    found = dict(quantize_tensors(scheme, again, GroupAmax(one, state.amax.get("a.q_proj" + INPUT_QUANTIZER)), blocks))
    assert found.keys() == tensors.keys()
    assert all(same_bytes(found[each], tensor) for each, tensor in tensors.items())
    assert torch.equal(source.read("norm.weight"), torch.ones(4))


def test_what_does_not_come_back_is_noted(tmp_path: Path) -> None:
    """A block whose largest code is 4 under a large scale: no arithmetic here makes it, so its values would change."""
    from safetensors.torch import load_file, save_file

    save(tmp_path, SCHEMES["nvfp4a16"], {"a.o_proj": torch.randn(4, 64).bfloat16()})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["a.o_proj.weight_packed"][0, :8] = 0x65
    save_file(tensors, tmp_path / "model.safetensors")
    source = opened(tmp_path)
    source.read("a.o_proj.weight")
    assert str(source.changed["a.o_proj"]) == "1 block scales, 8 bytes"


def test_tensors_that_are_missing_are_all_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, SCHEMES["nvfp4"], {f"a.{n}.o_proj": torch.randn(4, 64).bfloat16() for n in range(2)})
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("a.0.o_proj.input_global_scale", "a.1.o_proj.weight_global_scale"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path)
    assert "a.0.o_proj.input_global_scale: missing" in str(error.value)
    assert "a.1.o_proj.weight_global_scale: missing" in str(error.value)


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    save(tmp_path, SCHEMES["fp8"], {"a.o_proj": torch.randn(4, 64).bfloat16()})
    with pytest.raises(UsageError, match="quant_method='gptq'"):
        DequantizedCheckpoint(SafetensorsCheckpoint(tmp_path), {"quant_method": "gptq"})


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_a_config_says_which_scheme_it_is(scheme: Scheme) -> None:
    config = quantization_config({"a.o_proj": scheme}, ["lm_head"])
    read = read_quant_config(json.loads(json.dumps(config))).checked()
    assert read.scheme_of("a.o_proj") == scheme
    assert read.scheme_of("lm_head") is None


def test_a_module_without_a_scheme_is_named(tmp_path: Path) -> None:
    save(tmp_path, SCHEMES["fp8"], {"a.o_proj": torch.randn(4, 64).bfloat16()})
    config = {"config_groups": {}, "ignore": []}
    with pytest.raises(CheckpointError, match=r"a\.o_proj: quantized, and no group of config\.json targets it"):
        DequantizedCheckpoint(SafetensorsCheckpoint(tmp_path), config)
