"""Which scheme each module gets, what the state must hold for it, and what config.json says of it."""

import re
from typing import Any

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from amaxbridge.bridge.live.collect_amax import format_name
from amaxbridge.export.amax.fused_group_amax import MixedGroups, mixed_groups
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.architectures.engines import SGLANG, Layer, read_layer
from amaxbridge.export.architectures.facts import architecture_of
from amaxbridge.export.model_free.input_directory import check_ignored
from amaxbridge.export.output.finalizer import Bundle, Finalizer
from amaxbridge.export.quant_config import read_quant_config
from amaxbridge.export.schemes import SCHEMES, Groups, Recipe, SchemeGroup, find_scheme, from_quantizers
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.mappings.errors import AmaxError, MappingError, UsageError
from amaxbridge.mappings.tensors import TensorSpec

LAYER = "model.layers.{}"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LINEARS = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def model() -> dict[str, Tensor]:
    """Two layers of bf16 linears, the embedding and the head."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS]
    names += ["model.embed_tokens", "lm_head"]
    return {f"{name}.weight": torch.randn(16, 128, generator=generator).bfloat16() for name in names}


def state_of(formats: dict[str, str], *, inputs: bool = True, cache: str | None = None) -> QuantState:
    """A calibrated state: format by the last part of the names, and an FP8 key-value cache."""
    amax, found = dict[str, Tensor](), dict[str, str]()
    for number, name in enumerate(model()):
        module = name.removesuffix(".weight")
        for ending, form in formats.items():
            if module.endswith(ending):
                found[module] = form
                amax[f"{module}.weight_quantizer._amax"] = torch.tensor(3.0 + number)
                if inputs:
                    amax[f"{module}.input_quantizer._amax"] = torch.tensor(5.0 + number)
    for layer in range(2) if cache else ():
        for letter in "kv":
            quantizer = f"model.layers.{layer}.self_attn.{letter}_bmm_quantizer"
            amax[f"{quantizer}._amax"] = torch.tensor(7.0 + layer)
            found[quantizer] = cache or ""
    return QuantState(amax, found)


def finalizer_of(recipe: Recipe | None, state: QuantState | None, **options: Any) -> Finalizer:
    return Finalizer({name: TensorSpec.of(tensor) for name, tensor in model().items()}, recipe, state, **options)


def written(finalizer: Finalizer) -> dict[str, Tensor]:
    tensors = dict(finalizer.finalize(Bundle.of(model())))
    assert {name: TensorSpec.of(tensor) for name, tensor in tensors.items()} == finalizer.output_specs
    return tensors


def groups_of(finalizer: Finalizer) -> dict[str, list[str]]:
    """Format → targets."""
    config: Any = finalizer.quantization_config
    return {group["format"]: group["targets"] for group in config["config_groups"].values()}


# Calibrated


def test_static_fp8_shares_scales_in_a_group() -> None:
    tensors = written(finalizer_of(find_scheme("fp8"), state_of(dict.fromkeys(LINEARS, "fp8"))))
    for kind, amax in (("weight_scale", 5.0), ("input_scale", 7.0)):
        scales = {tensors[f"model.layers.0.{module}.{kind}"].item() for module in QKV}
        assert scales == {(torch.tensor(amax) / 448).item()}


def test_weights_only_has_no_input_scales() -> None:
    finalizer = finalizer_of(find_scheme("nvfp4a16"), state_of(dict.fromkeys(LINEARS, "nvfp4"), inputs=False))
    assert not [name for name in written(finalizer) if "input" in name]
    config: Any = finalizer.quantization_config
    assert config["config_groups"]["group_0"]["input_activations"] is None


def test_calibrated_inputs_are_not_dropped_for_a_scheme_without_them() -> None:
    with pytest.raises(UsageError, match=r"no place for 14 quantizer values.*\n.*input_quantizer"):
        finalizer_of(find_scheme("nvfp4a16"), state_of(dict.fromkeys(LINEARS, "nvfp4")))


@pytest.mark.parametrize(
    ("form", "inputs", "scheme"),
    [
        ("nvfp4", True, "nvfp4"),
        ("nvfp4", False, "nvfp4a16"),
        ("fp8", True, "fp8"),
        ("fp8_channel", False, "fp8_dynamic"),
        ("fp8_block", False, "fp8_block"),
        ("int8", False, "w8a8"),
        ("int4", False, "w4a16"),
        ("int4 group_size=64", False, "w4a16"),
        ("int4 group_size=32", False, "w4a16"),
        ("mxfp4", False, "mxfp4"),
        ("mxfp8", False, "mxfp8"),
    ],
)
def test_auto_reads_the_scheme_from_the_quantizers(form: str, inputs: bool, scheme: str) -> None:
    found = finalizer_of(find_scheme("auto"), state_of({"mlp.down_proj": form}, inputs=inputs))
    assert found.quantized == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert "lm_head" in found.ignore and "model.layers.0.mlp.up_proj" in found.ignore
    assert groups_of(found) == {SCHEMES[scheme].config_group["format"]: ["Linear"]}
    written(found)


def test_auto_of_mixed_quantizers() -> None:
    state = state_of({"self_attn.o_proj": "nvfp4", "mlp.down_proj": "fp8"})
    finalizer = finalizer_of(find_scheme("auto"), state)
    assert groups_of(finalizer) == {
        "nvfp4-pack-quantized": [r"re:model\.layers\.\d+\.self_attn\.o_proj$"],
        "float-quantized": [r"re:model\.layers\.\d+\.mlp\.down_proj$"],
    }
    config: Any = finalizer.quantization_config
    assert config["format"] == "mixed-precision"
    written(finalizer)


@pytest.mark.parametrize(("form", "inputs"), [("fp8", False), ("int8", True), ("num_bits=3", False)])
def test_auto_refuses_quantizers_that_no_scheme_writes(form: str, inputs: bool) -> None:
    with pytest.raises(UsageError, match=rf"down_proj has {form} weights and .*calibrated inputs"):
        finalizer_of(find_scheme("auto"), state_of({"mlp.down_proj": form}, inputs=inputs))


QUANTIZERS: dict[str, dict[str, Any]] = {
    "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    "mxfp4": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    "fp8": {"num_bits": (4, 3), "axis": None},
    "fp8_channel": {"num_bits": (4, 3), "axis": 0},
    "fp8_block": {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}},
    "int8": {"num_bits": 8, "axis": 0},
    "int4": {"num_bits": 4, "block_sizes": {-1: 128}},
    "int4 group_size=64": {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}},
    "int4 group_size=32": {"num_bits": 4, "block_sizes": {-1: 32}},
}


@pytest.mark.parametrize("form", QUANTIZERS)
def test_quantizers_of_modelopt_are_named(form: str) -> None:
    assert format_name(TensorQuantizer(QuantizerAttributeConfig(**QUANTIZERS[form]))) == form
    assert form in {scheme.format for scheme in from_quantizers().schemes}


def test_other_quantizers_are_described() -> None:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=3, block_sizes={-1: 64}))
    assert format_name(quantizer).startswith("num_bits=3 axis=")


@pytest.mark.parametrize("size", [32, 64, 128])
def test_groups_of_any_size_are_read_from_the_quantizers(size: int) -> None:
    form = format_name(TensorQuantizer(QuantizerAttributeConfig(num_bits=4, block_sizes={-1: size})))
    found = from_quantizers().scheme_of("m", QuantState(formats={"m": form}))
    assert found == w4a16(size)


# Key-value cache


@pytest.mark.parametrize("scheme", ["auto", "nvfp4"])
def test_scales_of_the_key_value_cache(scheme: str) -> None:
    finalizer = finalizer_of(find_scheme(scheme), state_of({"mlp.down_proj": "nvfp4"}, cache="fp8"))
    tensors = written(finalizer)
    for layer in range(2):
        for letter in "kv":
            scale = tensors[f"model.layers.{layer}.self_attn.{letter}_scale"]
            assert torch.equal(scale, torch.tensor([7.0 + layer]) / 448)
    config: Any = finalizer.quantization_config
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False
    }  # fmt: skip


def test_a_key_value_cache_that_is_not_fp8_is_refused() -> None:
    with pytest.raises(UsageError, match=r"4 quantizers of the key-value cache .*\n.*k_bmm_quantizer: nvfp4"):
        finalizer_of(find_scheme("nvfp4"), state_of({"mlp.down_proj": "nvfp4"}, cache="nvfp4"))


@pytest.mark.parametrize("value", [0.0, float("nan"), None])
def test_a_key_value_cache_without_a_scale_is_named(value: float | None) -> None:
    state = state_of({"mlp.down_proj": "nvfp4"}, cache="fp8")
    name = "model.layers.1.self_attn.v_bmm_quantizer._amax"
    amax = {key: tensor for key, tensor in state.amax.items() if key != name}
    if value is not None:
        amax[name] = torch.tensor(value)
    with pytest.raises(AmaxError, match=r"1 amax of the key-value cache .*\n  model\.layers\.1\.self_attn\.v_bmm"):
        finalizer_of(find_scheme("nvfp4"), QuantState(amax, state.formats, frozenset() if value else frozenset({name})))


# Without data


def test_the_first_group_that_targets_a_module_wins() -> None:
    attention = SchemeGroup(SCHEMES["fp8_dynamic"], ("re:.*self_attn",))
    one = SchemeGroup(SCHEMES["w8a8"], ("model.layers.1.mlp.down_proj",))
    rest = SchemeGroup(SCHEMES["nvfp4a16"])
    finalizer = finalizer_of(Groups((attention, one, rest), ignore=("lm_head",)), None)
    mlp = [rf"re:model\.layers\.\d+\.mlp\.{name}$" for name in ("(gate_proj|gate_up_proj)", "up_proj")]
    names = (r"self_attn\.(q_proj|qkv_proj)", *map(re.escape, LINEARS[1:4]))
    assert groups_of(finalizer) == {
        "float-quantized": [rf"re:model\.layers\.\d+\.{name}$" for name in names],
        "nvfp4-pack-quantized": [*mlp, "model.layers.0.mlp.down_proj"],
        "int-quantized": ["model.layers.1.mlp.down_proj"],
    }
    assert finalizer.ignore == ["lm_head"]
    assert written(finalizer)["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_a_head_is_a_target_by_name() -> None:
    finalizer = finalizer_of(Groups((SchemeGroup(SCHEMES["w8a8"], ("Linear", "lm_head")),)), None)
    assert "re:lm_head$" in groups_of(finalizer)["int-quantized"]


def test_a_group_of_two_schemes_is_refused() -> None:
    recipe = Groups((SchemeGroup(SCHEMES["w8a8"], ("re:.*q_proj",)), SchemeGroup(SCHEMES["nvfp4a16"])))
    with pytest.raises(MappingError, match=r"0\.self_attn\.q_proj as w8a8; .*k_proj, .*v_proj as nvfp4a16"):
        finalizer_of(recipe, None)


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
def test_static_inputs_need_a_state(scheme: str) -> None:
    with pytest.raises(UsageError, match="needs calibrated inputs"):
        finalizer_of(find_scheme(scheme), None)


def test_quantizers_that_no_group_targets_are_named() -> None:
    state = state_of({"mlp.down_proj": "nvfp4"})
    group = SchemeGroup(SCHEMES["nvfp4"], ("re:.*layers.0",))
    with pytest.raises(UsageError, match=r"1 modules have quantizers.*\n  model\.layers\.1\.mlp\.down_proj"):
        finalizer_of(Groups((group,)), state)
    ignoring = finalizer_of(Groups((group,), ignore=("re:.*layers.1",)), state)
    assert ignoring.quantized == ["model.layers.0.mlp.down_proj"]


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(UsageError, match="finds no linear module"):
        finalizer_of(Groups((SchemeGroup(SCHEMES["w8a8"]),), ignore=("re:.*",)), None)
    with pytest.raises(UsageError, match="reads the formats from quantizers"):
        finalizer_of(find_scheme("auto"), None)


def test_a_weight_that_is_not_finite_is_named() -> None:
    finalizer = finalizer_of(find_scheme("w8a8"), None)
    bundle = model()
    bundle["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    with pytest.raises(MappingError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN or Inf"):
        list(finalizer.finalize(Bundle.of(bundle)))


# Groups with several formats

LATENT = "model.layers.0.self_attn.{}"
EXPERT = "model.layers.0.mlp.experts.{}.{}"
MIXED: dict[str, tuple[str, ...]] = {
    "latent attention": (LATENT.format("q_a_proj"), LATENT.format("kv_a_proj_with_mqa")),
    "gate and up": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    "w1 and w3": (EXPERT.format(0, "w1"), EXPERT.format(0, "w3")),
    "gated delta net": tuple(f"model.layers.0.linear_attn.in_proj_{each}" for each in ("qkv", "z")),
    "down of two experts": (EXPERT.format(0, "down_proj"), EXPERT.format(1, "down_proj")),
    "gate and another expert's up": (EXPERT.format(0, "gate_proj"), EXPERT.format(12, "up_proj")),
}
"""Two modules that engines run as one layer."""
FORMATS = (("nvfp4", "fp8"), ("fp8", None), (None, "nvfp4"))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("group", MIXED)
def test_a_group_with_several_formats_is_named_or_unquantized(group: str, formats: tuple[str | None, ...]) -> None:
    other = "model.layers.0.self_attn.o_proj"
    given = {**dict(zip(MIXED[group], formats, strict=True)), other: "fp8"}
    tensors = {f"{module}.weight": torch.full((16, 32), 0.5, dtype=torch.bfloat16) for module in given}
    amax = {f"{module}.{kind}_quantizer._amax": torch.tensor(2.0) for module in given for kind in ("weight", "input")}
    held = {name: each for name, each in amax.items() if given[name.rsplit(".", 2)[0]]}
    state = QuantState(held, {module: form for module, form in given.items() if form})
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with pytest.raises(MappingError, match=r"as one:(.|\n)*mixed_groups=unquantized") as refusal:
        Finalizer(specs, find_scheme("auto"), state)
    assert all(module in str(refusal.value) for module in MIXED[group])
    assert other not in str(refusal.value)
    finalizer = Finalizer(specs, find_scheme("auto"), state, mixed=MixedGroups.UNQUANTIZED)
    assert finalizer.unified == list(MIXED[group])
    assert finalizer.scheme_names == {other: "fp8"}
    made = dict(finalizer.finalize(Bundle.of(tensors)))
    assert all(torch.equal(made[f"{module}.weight"], tensors[f"{module}.weight"]) for module in MIXED[group])


def test_other_groups_may_differ() -> None:
    """Experts of two layers, up and down of an expert, a routed and a shared expert."""
    given = {
        EXPERT.format(0, "gate_proj"): "nvfp4", EXPERT.format(0, "up_proj"): "nvfp4",
        EXPERT.format(0, "down_proj"): "fp8",
        "model.layers.1.mlp.experts.0.down_proj": "nvfp4", "model.layers.0.mlp.shared_experts.down_proj": "nvfp4",
    }  # fmt: skip
    specs = {f"{module}.weight": TensorSpec((16, 32), torch.bfloat16) for module in given}
    amax = {f"{module}.{kind}_quantizer._amax": torch.tensor(2.0) for module in given for kind in ("weight", "input")}
    assert Finalizer(specs, find_scheme("auto"), QuantState(amax, given)).scheme_names == given
    assert not mixed_groups(given)


def test_engines_names_of_fused_layers_are_targets_and_ignored() -> None:
    """SGLang asks for `qkv_proj`, and of many architectures does not know its members."""
    formats = {**dict.fromkeys((*QKV, "self_attn.o_proj"), "fp8"), "mlp.gate_proj": "nvfp4", "mlp.up_proj": "nvfp4"}
    state = state_of(formats)
    ignore = ("re:model.layers.1.self_attn.[qkv]_proj",)
    config: Any = finalizer_of(find_scheme("auto", ignore), state).quantization_config
    quantized = read_quant_config(config)
    asked = {
        "model.layers.0.self_attn.qkv_proj": "float-quantized",
        "model.layers.0.mlp.gate_up_proj": "nvfp4-pack-quantized",
        "model.layers.1.mlp.gate_up_proj": "nvfp4-pack-quantized",
        "model.layers.1.self_attn.qkv_proj": None,
        "model.layers.1.mlp.down_proj": None,
    }
    for layer, form in asked.items():
        reading = read_layer(SGLANG, Layer(layer, (layer,)), quantized)
        assert (None if reading.group is None else quantized.groups[reading.group].format) == form, layer
        assert "neither" not in reading.why


def test_experts_without_a_gate_and_renamed_layers_are_targets_and_ignored() -> None:
    """Engines ask for a gate of the first expert all the same, and call `backbone.layers` `model.layers`."""
    mixer = "backbone.layers.{}.mixer"
    formats = {f"{mixer.format(0)}.in_proj": "fp8"} | {
        f"{mixer.format(1)}.experts.{expert}.{each}_proj": "nvfp4" for expert in range(2) for each in ("up", "down")
    }
    plain = [f"{mixer.format(3)}.experts.0.{each}_proj" for each in ("up", "down")]
    specs = {f"{module}.weight": TensorSpec((16, 32), torch.bfloat16) for module in [*formats, *plain]}
    amax = {f"{module}.{kind}_quantizer._amax": torch.tensor(2.0) for module in formats for kind in ("weight", "input")}
    known = architecture_of({"architectures": ["NemotronHForCausalLM"], "num_hidden_layers": 4})
    assert known is not None
    finalizer = Finalizer(specs, find_scheme("auto"), QuantState(amax, formats), knowledge=known)
    quantized = read_quant_config(finalizer.quantization_config)
    asked = {"model.layers.0.mixer.in_proj": "fp8", "backbone.layers.0.mixer.in_proj": "fp8"}
    asked |= {
        f"model.layers.1.mixer.experts.0.{each}": "nvfp4" for each in ("up_proj", "None", "down_proj", "gate_proj")
    }
    for layer, scheme in asked.items():
        reading = read_layer(SGLANG, Layer(layer, (layer,)), quantized)
        group = None if reading.group is None else quantized.groups[reading.group]
        assert group is not None and group.scheme is not None and group.scheme.name == scheme, layer
    gates = {f"backbone.layers.3.mixer.experts.0.{each}" for each in ("up_proj", "None", "gate_proj")}
    assert gates <= set(quantized.ignore)


def test_the_ignore_list_of_an_output_can_be_given_again() -> None:
    state = state_of(dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "nvfp4"))
    config: Any = finalizer_of(find_scheme("auto"), state).quantization_config
    assert "model.layers.0.self_attn.qkv_proj" in config["ignore"]
    modules = [name.removesuffix(".weight") for name in model()]
    check_ignored(config["ignore"], modules)
    with pytest.raises(UsageError, match="gate_up_projection"):
        check_ignored([*config["ignore"], "model.layers.0.mlp.gate_up_projection"], modules)
