"""Equal weights quantized at once: bit for bit what each gives alone."""

import pytest
import torch
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import BlockAmax, StackAmax
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.schemes import SCHEMES, Scheme
from amaxbridge.export.schemes.modelopt import modelopt_schemes
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.hard_weights import same_bytes

ALL = [*SCHEMES.values(), *modelopt_schemes()]
SHAPES = {"whole blocks": (256, 256), "blocks cut at the edge": (72, 384)}
COUNT = 3


def stack(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(shape, generator=generator) * 10.0**-each for each in range(COUNT)]
    return [weight.to(dtype) for weight in weights]


def amax_of(scheme: Scheme, weights: list[Tensor], arithmetic: Arithmetic) -> StackAmax:
    """An amax for each weight, some too small for it."""
    measured = [scheme.measure(weight, arithmetic) for weight in weights]
    of_weights = None if None in measured else torch.stack([each.reshape(()) for each in measured]) * 0.9
    of_inputs = torch.tensor([0.3, 7.0, 11.5]) if scheme.needs_input_amax else None
    return StackAmax(COUNT, of_weights, of_inputs, arithmetic)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: f"{scheme.file_format}-{scheme.name}")
def test_a_stack_is_its_weights(scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weights, spec = stack(shape, dtype), TensorSpec(shape, dtype)
    for arithmetic in Arithmetic:
        if not scheme.format and arithmetic is Arithmetic.MODELOPT:
            continue  # ModelOpt has no quantizer for it
        amax = amax_of(scheme, weights, arithmetic)
        found = {**scheme.quantize_stack(torch.cat(weights), amax), **scheme.constants_of_stack(spec, amax)}
        alone = [
            {**scheme.quantize_rows(weight, each), **scheme.constants(spec, each)}
            for weight, each in zip(weights, amax.each(), strict=True)
        ]
        assert found.keys() == scheme.tensor_specs(spec, arithmetic).keys()
        for name, tensor in found.items():
            parts = tensor if name in scheme.constants(spec, amax.each()[0]) else tensor.chunk(COUNT)
            assert len(parts) == COUNT
            for part, each in zip(parts, alone, strict=True):
                assert same_bytes(part, each[name]), (name, arithmetic)


@pytest.mark.parametrize("scheme", [each for each in ALL if each.blocks.height], ids=lambda scheme: scheme.name)
def test_amax_of_blocks_stay_with_their_weights(scheme: Scheme) -> None:
    weights = stack((256, 256), torch.bfloat16)
    if not scheme.format or "mx" in scheme.format:
        return  # no amax of blocks are kept
    blocks = [torch.rand(scheme.blocks.shape(256, 256)) + 0.5 for _ in weights]
    amax = amax_of(scheme, weights, Arithmetic.MODELOPT)
    found = scheme.quantize_stack(torch.cat(weights), amax, BlockAmax(torch.cat(blocks)))
    for at, each in enumerate(amax.each()):
        for name, tensor in scheme.quantize_rows(weights[at], each, BlockAmax(blocks[at])).items():
            assert same_bytes(found[name].chunk(COUNT)[at], tensor), name


def test_memory_that_is_given_is_filled() -> None:
    weights, scheme = stack((64, 128), torch.bfloat16), SCHEMES["nvfp4"]
    amax = amax_of(scheme, weights, Arithmetic.MODELOPT)
    expected = scheme.quantize_stack(torch.cat(weights), amax)
    into = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    found = scheme.quantize_stack(torch.cat(weights), amax, None, into)
    for name, tensor in expected.items():
        assert found[name].data_ptr() == into[name].data_ptr()
        assert same_bytes(into[name], tensor)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weights = stack((64, 128), torch.bfloat16)
    weights[1][3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        SCHEMES["nvfp4"].quantize_stack(torch.cat(weights), StackAmax(COUNT, torch.ones(COUNT), torch.ones(COUNT)))


def test_an_amax_without_a_scale_is_named() -> None:
    amax = StackAmax(COUNT, torch.tensor([1.0, 0.0, 2.0]), torch.ones(COUNT))
    with pytest.raises(ValueError, match=r"amax 0\.0 gives scale inf"):
        SCHEMES["nvfp4"].quantize_stack(torch.ones(6, 16), amax)
