"""Other projects' converters: their whole protocol, packed experts, and layers that they leave quantized."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert import (
    AutoAWQConverter,
    CompressedTensorsDequantizer,
    FP8BlockDequantizer,
    MagnitudeExpertPruner,
    ModelOptNvfp4Converter,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from amaxbridge.export import (
    model_free_ptq,
    process_file,
    process_file_microscale_scheme,
    split_fused_moe_experts,
    validate_file,
)
from amaxbridge.export.quant_config import read_quant_config
from amaxbridge.export.schemes import SCHEMES, Groups, named_scheme
from amaxbridge.mappings.errors import CheckpointError, MappingError, UsageError
from tests.support import quantized_sources as held
from tests.support.checkpoints import (
    DENSE,
    MOE,
    cuts_inside_groups,
    dense_model,
    moe_model,
    tensors_of,
    write_checkpoint,
)
from tests.support.hard_weights import of_module
from tests.support.in_memory import expected, same
from tests.support.quantized_sources import Held

ATTENTION = r"re:.*self_attn\.[qkvo]_proj$"
MLP = r"re:.*mlp\..*_proj$"


def held_in(tensors: dict[str, Tensor], hold: Any, only: str) -> tuple[dict[str, Tensor], dict[str, Held]]:
    """Tensors with the `_proj` weights whose name contains `only` in a format, and these modules."""
    stored, modules = dict[str, Tensor](), dict[str, Held]()
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and only in name and tensor.ndim == 2:
            modules[module] = hold(tensor)
            stored |= {f"{module}.{local}": each for local, each in modules[module].tensors.items()}
        else:
            stored[name] = tensor
    return stored, modules


@pytest.mark.parametrize("scheme", ["nvfp4a16", "fp8_block"])
@pytest.mark.parametrize("cut", [False, True], ids=["one file", "groups cut"])
def test_packed_experts_are_split_before_a_converter(scheme: str, cut: bool, tmp_path: Path) -> None:
    """Attention in FP8 blocks, experts packed and plain: every expert is quantized."""
    plain = moe_model(packed=True)
    stored, modules = held_in(plain, held.blocks_of_fp8, "self_attn")
    assert len(modules) == 8
    source = write_checkpoint(tmp_path / "in", stored, cuts=cuts_inside_groups(stored) if cut else (), config=MOE)
    report = model_free_ptq(source, tmp_path / "out", scheme, converter=FP8BlockDequantizer(targets=[ATTENTION]))
    meant = plain | {f"{module}.weight": each.weight.bfloat16() for module, each in modules.items()}
    recipe = Groups.of(SCHEMES[scheme], ["re:.*mlp\\.gate$", "lm_head"])
    same(tensors_of(tmp_path / "out"), expected(split_fused_moe_experts(meant), recipe))
    assert sum(".experts." in module for module in report.quantized) == 24


class TestPartial:
    """Converters that leave layers quantized, losslessly: several groups, and the config says so."""

    @pytest.mark.parametrize("scheme", ["fp8_dynamic", "nvfp4a16", "mxfp8"])
    def test_nvfp4_of_modelopt(self, scheme: str, tmp_path: Path) -> None:
        stored, modules = held_in(dense_model(), held.nvfp4, "mlp")
        source = write_checkpoint(tmp_path / "in", stored, cuts=cuts_inside_groups(stored))
        report = model_free_ptq(source, tmp_path / "out", scheme, converter=ModelOptNvfp4Converter(targets=[MLP]))
        found = tensors_of(tmp_path / "out")
        for module, each in modules.items():
            kept = of_module(module, found)
            assert torch.equal(kept["weight_packed"], each.tensors["weight"])
            assert torch.equal(kept["weight_global_scale"], 1 / each.tensors["weight_scale_2"].reshape(1))
            assert torch.equal(kept["input_global_scale"], 1 / each.tensors["input_scale"].reshape(1))
        assert {module for module, name in report.quantized.items() if name == "nvfp4"} == modules.keys()
        rest = expected({name: each for name, each in dense_model().items() if ".mlp." not in name}, scheme)
        same({name: found[name] for name in rest}, rest)
        config = read_quant_config(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
        assert len(config.checked().groups) == 2
        for module, name in report.quantized.items():
            assert config.scheme_of(module) == SCHEMES[name], module

    def test_awq(self, tmp_path: Path) -> None:
        """Its `validate` gives names without shapes, and its `process` must see values."""
        stored, modules = held_in(dense_model(), held.awq, "self_attn")
        source = write_checkpoint(tmp_path / "in", stored, cuts=cuts_inside_groups(stored))
        converter = AutoAWQConverter(group_size=64, targets=[ATTENTION])
        report = model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=converter)
        found, scheme = tensors_of(tmp_path / "out"), named_scheme("w4a16_asym", 64)
        assert len(modules) == 8
        for module, each in modules.items():
            assert torch.equal(scheme.dequantize(of_module(module, found), torch.float32), each.weight)
        assert sorted(set(report.quantized.values())) == ["nvfp4a16", "w4a16_asym"]
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["format"] == "mixed-precision"
        assert [group["format"] for group in config["config_groups"].values()] == [
            "pack-quantized",
            "nvfp4-pack-quantized",
        ]

    def test_everything_is_kept(self, tmp_path: Path) -> None:
        """Nothing is left to quantize, or no scheme is asked for."""
        stored, modules = held_in(dense_model(), held.nvfp4, "")
        source = write_checkpoint(tmp_path / "in", stored)
        converter = ModelOptNvfp4Converter(targets=["re:.*_proj$"])
        report = model_free_ptq(source, tmp_path / "out", "fp8_dynamic", converter=converter)
        assert report.quantized == dict.fromkeys(modules, "nvfp4")
        model_free_ptq(source, tmp_path / "none", "none", converter=converter)
        same(tensors_of(tmp_path / "none"), tensors_of(tmp_path / "out"))
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "none")]
        assert configs[0] == configs[1]

    def test_a_fused_group_cannot_be_half_kept(self, tmp_path: Path) -> None:
        stored, _ = held_in(dense_model(1), held.nvfp4, "q_proj")
        source = write_checkpoint(tmp_path / "in", stored)
        with pytest.raises(MappingError, match=r"fused groups must be quantized as one(.|\n)*q_proj"):
            model_free_ptq(
                source, tmp_path / "out", "fp8_dynamic", converter=ModelOptNvfp4Converter(targets=["re:.*q_proj$"])
            )

    def test_what_no_config_explains(self, tmp_path: Path) -> None:
        class Silent(ModelOptNvfp4Converter):
            def update_config(self, config: Any) -> Any:
                return None

        stored, _ = held_in(dense_model(1), held.nvfp4, "mlp")
        source = write_checkpoint(tmp_path / "in", stored)
        with pytest.raises(UsageError, match=r"leaves 3 modules quantized(.|\n)*down_proj(.|\n)*update_config"):
            model_free_ptq(source, tmp_path / "out", "fp8_dynamic", converter=Silent(targets=[MLP]))
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


class TestProtocol:
    """Converters with the whole protocol, and converters with a part of it."""

    def test_one_whose_validate_returns_nothing(self, tmp_path: Path) -> None:
        class Old(FP8BlockDequantizer):
            def validate(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
                super().validate(tensors)

        stored, modules = held_in(dense_model(1), held.blocks_of_fp8, "")
        source = write_checkpoint(tmp_path / "in", stored)
        model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=Old(targets=["re:.*_proj$"]))
        meant = dense_model(1) | {f"{module}.weight": each.weight.bfloat16() for module, each in modules.items()}
        same(tensors_of(tmp_path / "out"), expected(meant, "nvfp4a16"))

    def test_one_with_two_methods(self, tmp_path: Path) -> None:
        class Small:
            def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                return {name.replace("transformer.", "model."): tensor * 2 for name, tensor in tensors.items()}

            def get_dependencies(self, weight_name: str) -> set[str]:
                return set()

        tensors = dense_model(1)
        stored = {name.replace("model.", "transformer."): tensor for name, tensor in tensors.items()}
        source = write_checkpoint(tmp_path / "in", stored)
        model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=Small())
        same(tensors_of(tmp_path / "out"), expected({name: each * 2 for name, each in tensors.items()}, "nvfp4a16"))

    def test_one_after_the_other(self, tmp_path: Path) -> None:
        """Each converter sees the tensors and the config that the one before it made."""
        seen = list[Any]()

        class Watching:
            def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                assert not any("scale_inv" in name for name in tensors)
                return tensors

            validate = process

            def get_dependencies(self, weight_name: str) -> set[str]:
                return set()

            def update_config(self, config: Any) -> Any:
                seen.append(config)
                return config

            def update_model_config(self, model_config: dict[str, Any]) -> dict[str, Any]:
                return {**model_config, "text_config": {"made_by": "hand"}}

        stored, _ = held_in(dense_model(1), held.blocks_of_fp8, "")
        source = write_checkpoint(
            tmp_path / "in", stored, config={**DENSE, "quantization_config": {"quant_method": "fp8"}}
        )
        converters = [FP8BlockDequantizer(targets=["re:.*_proj$"]), Watching()]
        model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=converters)
        assert seen == [None]
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["text_config"] == {"made_by": "hand"}

    def test_the_config_of_a_source_of_compressed_tensors_is_passed_on(self, tmp_path: Path) -> None:
        """Served with NVFP4 attention, the rest is quantized now: the converter keeps, and so does the config."""
        recipe = Groups.of(SCHEMES["nvfp4a16"], [MLP])
        first = write_checkpoint(tmp_path / "in", dense_model())
        model_free_ptq(first, tmp_path / "half", recipe)

        class Keeping:
            def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                return tensors

            def get_dependencies(self, weight_name: str) -> set[str]:
                return set()

            def update_config(self, config: Any) -> Any:
                assert type(config).__name__ == "QuantizationConfig"
                return config

        report = model_free_ptq(tmp_path / "half", tmp_path / "out", "fp8_dynamic", converter=Keeping())
        assert sorted(set(report.quantized.values())) == ["fp8_dynamic", "nvfp4a16"]
        half, found = tensors_of(tmp_path / "half"), tensors_of(tmp_path / "out")
        same(
            {name: found[name] for name in half if "self_attn" in name}, {n: half[n] for n in half if "self_attn" in n}
        )

    def test_one_that_dequantizes_compressed_tensors(self, tmp_path: Path) -> None:
        """Its `process` reads a shape from a tensor."""
        write_checkpoint(tmp_path / "in", dense_model(1))
        model_free_ptq(tmp_path / "in", tmp_path / "served", "w4a16")
        converter = CompressedTensorsDequantizer(tmp_path / "served", ["re:.*embed_tokens$"])
        model_free_ptq(tmp_path / "served", tmp_path / "out", "mxfp8", converter=converter)
        stored, scheme = tensors_of(tmp_path / "served"), SCHEMES["w4a16"]
        plain = {
            name: scheme.dequantize(of_module(name.removesuffix(".weight"), stored)) if "_proj" in name else tensor
            for name, tensor in dense_model(1).items()
        }
        same(tensors_of(tmp_path / "out"), expected(plain, "mxfp8"))

    def test_one_that_changes_the_model(self, tmp_path: Path) -> None:
        """It prunes experts, and config.json says how many are left."""
        tensors = moe_model(1)
        source = write_checkpoint(tmp_path / "in", tensors, config={**MOE, "num_experts": 4, "num_experts_per_tok": 1})
        converter = MagnitudeExpertPruner.from_pretrained(
            str(source), r"mlp\.gate\.weight$", r"mlp\.experts\.\d+\..*weight$", 0.5
        )
        model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=converter)
        retained = converter.retained_experts["model.layers.0.mlp.gate.weight"]
        found = tensors_of(tmp_path / "out")
        assert len(retained) == 2
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 2
        assert torch.equal(found["model.layers.0.mlp.gate.weight"], tensors["model.layers.0.mlp.gate.weight"][retained])
        renumbered = {
            f"model.layers.0.mlp.experts.{new}.{part}.weight": tensors[
                f"model.layers.0.mlp.experts.{old}.{part}.weight"
            ]
            for new, old in enumerate(retained)
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        made = expected(renumbered, "nvfp4a16")
        assert len(made) == 18
        same({name: found[name] for name in made}, made)

    def test_one_that_lies(self, tmp_path: Path) -> None:
        """It makes other tensors of values than of shapes. The run is refused, and the output stays empty."""

        class Lying:
            def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                return {name: each if each.is_meta else each.float() for name, each in tensors.items()}

            def get_dependencies(self, weight_name: str) -> set[str]:
                return set()

        source = write_checkpoint(tmp_path / "in", dense_model(1))
        with pytest.raises(CheckpointError, match=r"other tensors than it announced:(.|\n)*float32, planned"):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=Lying())
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("hold", [held.nvfp4, held.awq, held.fp8_per_tensor])
    def test_one_that_is_for_something_else(self, hold: Any, tmp_path: Path) -> None:
        stored, _ = held_in(dense_model(1), hold, "")
        source = write_checkpoint(tmp_path / "in", stored)
        with pytest.raises((CheckpointError, UsageError), match=r"layers\.0\.mlp\.down_proj"):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=FP8BlockDequantizer(targets=["re:.*_proj$"]))
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    def test_one_that_leaves_codes(self, tmp_path: Path) -> None:
        """It leaves codes of a format that it does not know."""
        stored, _ = held_in(dense_model(1), held.gptq, "")
        source = write_checkpoint(tmp_path / "in", stored)
        with pytest.raises(UsageError, match=r"nothing says how to read them(.|\n)*down_proj"):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", converter=FP8BlockDequantizer(targets=["re:nothing"]))


class TestOneFile:
    """The founding functions work on the tensors they are given."""

    def test_a_file_without_linears(self, tmp_path: Path) -> None:
        norms = {
            "model.norm.weight": torch.ones(64).bfloat16(),
            "model.embed_tokens.weight": torch.ones(8, 64).bfloat16(),
        }
        save_file(norms, tmp_path / "in.safetensors")
        for process in (process_file, process_file_microscale_scheme):
            size, weight_map = process(
                {str(tmp_path / "in.safetensors"): None}, tmp_path / "out.safetensors", "nvfp4a16"
            )
            assert (size, weight_map) == (64 * 2 + 8 * 64 * 2, dict.fromkeys(norms, "out.safetensors"))
            same(load_file(tmp_path / "out.safetensors"), norms)

    @pytest.mark.parametrize("wanted", [{}, {"in.safetensors": []}], ids=str)
    def test_nothing_is_nothing(self, wanted: dict[str, list[str]], tmp_path: Path) -> None:
        save_file(dense_model(1), tmp_path / "in.safetensors")
        given = {str(tmp_path / name): names for name, names in wanted.items()}
        validate_file(given, tmp_path / "out.safetensors", "nvfp4a16")
        assert process_file(given, tmp_path / "out.safetensors", "nvfp4a16") == (0, {})
        assert load_file(tmp_path / "out.safetensors") == {}

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("model.layers.0.mixer.conv1d.weight", (64, 1, 4)),
            ("model.layers.0.self_attn.q_proj.weight", (4, 64, 64)),
            ("model.layers.0.ln_1.weight", (64,)),
        ],
    )
    def test_two_dims(self, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        """A weight without two dims is named, unless its name ends in norm or stands in `ignore`."""
        save_file({**dense_model(1), name: torch.ones(shape).bfloat16()}, tmp_path / "in.safetensors")
        wanted = {str(tmp_path / "in.safetensors"): None}
        with pytest.raises(MappingError, match=rf"1 weights that the scheme targets(.|\n)*{name}(.|\n)*ignore"):
            validate_file(wanted, tmp_path / "out.safetensors", "fp8_dynamic")
        validate_file(wanted, tmp_path / "out.safetensors", "fp8_dynamic", [name.removesuffix(".weight")])

    def test_quantized_tensors(self, tmp_path: Path) -> None:
        """Read as those of a directory are: by themselves, by name, or by the config.json beside them."""
        stored, modules = held_in(dense_model(1), held.blocks_of_fp8, "")
        meant = dense_model(1) | {f"{module}.weight": each.weight.bfloat16() for module, each in modules.items()}
        save_file(stored, tmp_path / "in.safetensors")
        for converter in (None, "fp8_block", FP8BlockDequantizer(targets=["re:.*_proj$"])):
            process_file(
                {str(tmp_path / "in.safetensors"): None}, tmp_path / "out.safetensors", "nvfp4a16", converter=converter
            )
            same(load_file(tmp_path / "out.safetensors"), expected(meant, "nvfp4a16"))
        stored, modules = held_in(dense_model(1), held.awq, "")
        meant = dense_model(1) | {f"{module}.weight": each.weight.bfloat16() for module, each in modules.items()}
        config = {**DENSE, "quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}
        source = write_checkpoint(tmp_path / "in", stored, config=config) / "model.safetensors"
        process_file({str(source): None}, tmp_path / "out.safetensors", "nvfp4a16")
        same(load_file(tmp_path / "out.safetensors"), expected(meant, "nvfp4a16"))
