"""A scheme answers for itself: no code outside its package asks which scheme it holds."""

import ast
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from amaxbridge.bridge.live.collect_amax import format_name
from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.schemes import SCHEMES, quantizer_format
from amaxbridge.export.schemes.scheme import Scheme
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.hard_weights import same_bytes
from tests.support.paths import ROOT

ROOMS = ("mappings", "export", "bridge", "scripts", "configs")
OUTSIDE = [
    path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if (ROOT / "export" / "schemes") not in path.parents
]
OF_ALL = {"quantizer_settings", "recipe", "scheme", "signature", "stored_specs", "targets"}
"""Modules of the package that are about every scheme."""
NAMES = {*SCHEMES, *(scheme.format for scheme in SCHEMES.values()), *(each.upper() for each in SCHEMES)} - {""}

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)

PRESETS: dict[str, tuple[Any, Any]] = {  # of ModelOpt: whose weights, and whose inputs, are the scheme's
    "nvfp4": (mtq.NVFP4_DEFAULT_CFG, mtq.NVFP4_DEFAULT_CFG),
    "nvfp4a16": (mtq.NVFP4_DEFAULT_CFG, None),
    "mxfp4": (mtq.MXFP4_DEFAULT_CFG, mtq.MXFP4_DEFAULT_CFG),
    "mxfp4a16": (mtq.MXFP4_DEFAULT_CFG, None),
    "mxfp8": (mtq.MXFP8_DEFAULT_CFG, mtq.MXFP8_DEFAULT_CFG),
    "mxfp8a16": (mtq.MXFP8_DEFAULT_CFG, None),
    "fp8": (mtq.FP8_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG),
    "fp8_dynamic": (mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
    "fp8_block": (mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, None),
    "w8a8": (mtq.INT8_WEIGHT_ONLY_CFG, None),
    "w4a16": (mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, None),
}


# Nobody asks


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_scheme_is_known_by_name_or_type_outside(path: Path) -> None:
    """No import of one scheme's module, and no comparison with a scheme's name or format."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("amaxbridge.export.schemes."):
            assert (node.module or "").rpartition(".")[2] in OF_ALL, f"line {node.lineno} imports {node.module}"
        if isinstance(node, ast.Compare):
            literals = [each.value for each in (node.left, *node.comparators) if isinstance(each, ast.Constant)]
            about = ast.unparse(node)
            if "scheme" in about or "format" in about:
                assert not NAMES.intersection(map(str, literals)), f"line {node.lineno}: {about}"


def test_the_guard_sees_files() -> None:
    assert len(OUTSIDE) > 120


def test_whose_rounding_is_an_arithmetic_everywhere() -> None:
    """No argument of another name or type says it; the constants that a compiled kernel takes are its own."""
    seen = 0
    for path in sorted((ROOT / "export").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.annotation is not None:
                annotation = ast.unparse(node.annotation)
                seen += annotation == "Arithmetic"
                assert (node.arg == "arithmetic") == (annotation == "Arithmetic"), f"{path}: {node.arg}: {annotation}"
                assert not {"calibrated", "modelopt"} & {node.arg}, f"{path}:{node.lineno}"
    assert seen > 25


# What a scheme answers


@pytest.mark.parametrize("name", PRESETS)
def test_quantizers_are_those_of_modelopts_presets(name: str) -> None:
    seen = 0
    settings = (SCHEMES[name].weight_quantizer, SCHEMES[name].input_quantizer)
    for ours, preset, kind in zip(settings, PRESETS[name], ("weight", "input"), strict=True):
        if preset is None:
            continue
        theirs = next(each["cfg"] for each in preset["quant_cfg"] if each["quantizer_name"] == f"*{kind}_quantizer")
        assert ours is not None
        made = QuantizerAttributeConfig(**ours.attributes)
        wanted = QuantizerAttributeConfig(**{key: each for key, each in theirs.items() if key != "effective_bits"})
        assert made == wanted
        seen += 1
    assert seen == 2 - (PRESETS[name][1] is None)


@every_scheme
def test_quantizers_are_named_by_the_format_of_the_scheme(scheme: Scheme) -> None:
    if scheme.weight_quantizer is None:
        assert scheme.format == ""
        return
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**scheme.weight_quantizer.attributes))
    assert format_name(quantizer) == scheme.format


def test_quantizers_of_no_scheme_have_no_format() -> None:
    assert quantizer_format(3, None, {-1: 64}) is None
    assert quantizer_format((2, 1), None, {-1: 16, "scale_bits": (8, 0)}) is None


@every_scheme
@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_names_are_local_and_shapes_are_read_back(scheme: Scheme, arithmetic: Arithmetic) -> None:
    specs = scheme.tensor_specs(TensorSpec((256, 512), torch.bfloat16), arithmetic)
    assert not any("." in name for name in specs)
    assert scheme.codes in specs and "weight_scale" in specs
    assert scheme.weight_shape(specs) == (256, 512)
    others = {name: spec for name, spec in specs.items() if name != scheme.codes}
    assert scheme.weight_shape(others) is None
    for scale in (scheme.group_scale, scheme.input_scale):
        assert scale is None or specs[scale.tensor].shape == (1,)


@every_scheme
def test_scales_of_a_group_imply_their_amax(scheme: Scheme) -> None:
    seen = 0
    for scale in (scheme.group_scale, scheme.input_scale):
        if scale is None:
            continue
        for amax in (torch.tensor(0.37), torch.tensor(11.0)):
            stored = scale.stored(amax)
            assert same_bytes(scale.stored(scale.amax(stored)), stored)
            assert scale.implied(float(stored)) == pytest.approx(float(amax), rel=1e-6)
            seen += 1
    assert seen == 2 * (scheme.needs_weight_amax + scheme.needs_input_amax)


@every_scheme
def test_a_shard_multiple_holds_whole_blocks(scheme: Scheme) -> None:
    multiple, blocks = scheme.shard_multiple, scheme.blocks
    assert multiple.inputs % (blocks.width or 1) == 0
    assert multiple.outputs % (blocks.height or 1) == 0


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "mxfp8a16", "fp8_dynamic"])
def test_codes_that_exist_are_taken_as_they_are(name: str) -> None:
    scheme, weight = SCHEMES[name], torch.randn(256, 384, generator=torch.Generator().manual_seed(2)).bfloat16()
    made = scheme.quantize_rows(weight, GroupAmax(None, None))
    taken = scheme.adopt(made["weight"], made["weight_scale"])
    assert taken.keys() == made.keys()
    assert all(same_bytes(taken[each], tensor) for each, tensor in made.items())
    with pytest.raises(ValueError, match=rf"{name} cannot take .* as they are: it stores weight \[256, 384\]"):
        scheme.adopt(made["weight"], made["weight_scale"][:1])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "w4a16"])
def test_formats_of_packed_codes_take_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot take"):
        SCHEMES[name].adopt(torch.zeros(128, 128, dtype=torch.int8), torch.ones(128, 1))
