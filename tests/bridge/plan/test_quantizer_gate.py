"""The gate knows every attribute that ModelOpt keeps on a quantizer, or refuses it by name, live and stored."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import SequentialQuantizer, StaticBlockScaleQuantizer, TensorQuantizer
from modelopt.torch.quantization.nn.modules import tensor_quantizer
from torch import nn

from amaxbridge.bridge.live.model_walk import ABSENT, Quantizer, walk_all_quantizers
from amaxbridge.bridge.plan.quantizer_gate import BOUND, READ, WITHOUT_EFFECT, check_quantizers, refusals
from amaxbridge.mappings.errors import UsageError

KNOWN = READ | BOUND.keys() | WITHOUT_EFFECT.keys()
NVFP4: Mapping[str, Any] = {
    "num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}
}  # fmt: skip


def made(**settings: Any) -> TensorQuantizer:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**{**NVFP4, **settings}))
    quantizer.amax = torch.ones(8, 1)
    return quantizer


def walked(quantizer: nn.Module, kind: str = "weight") -> list[Quantizer]:
    model, layer, linear = nn.Module(), nn.Module(), nn.Linear(16, 8)
    linear.add_module(f"{kind}_quantizer", quantizer)
    layer.linear_fc2 = linear
    model.layers = nn.ModuleList([layer])
    return list(walk_all_quantizers([model]))


def refused(quantizer: nn.Module, kind: str = "weight", *, plain: bool = False) -> str:
    """The message of the refusal; empty if nothing is refused."""
    try:
        check_quantizers(refusals(walked(quantizer, kind)), lambda name: plain)
    except UsageError as error:
        return str(error)
    return ""


def test_every_setting_of_modelopt_is_known() -> None:
    quantizer = made()
    StaticBlockScaleQuantizer.from_tensor_quantizer(quantizer, torch.tensor(1.0))
    quantizer.enable_lsq(learnable_amax=["pre", "post"])
    assert len(QuantizerAttributeConfig.model_fields) > 15
    (found,) = walked(quantizer)
    assert found.attributes.keys() <= KNOWN
    assert {"_amax_post", "_amax_pre", "_global_amax", "_lsq"} <= found.attributes.keys()
    assert not refused(quantizer)


def test_every_name_in_the_source_of_modelopt_is_known() -> None:
    """A new attribute in a new ModelOpt must be looked at."""
    source = inspect.getsource(tensor_quantizer)
    assigned = set(re.findall(r"\bself\.(_?\w+) = ", source)) | set(re.findall(r'register_buffer\(\s*"(\w+)"', source))
    with_setters = {
        name for name, member in inspect.getmembers(StaticBlockScaleQuantizer) if isinstance(member, property)
    }
    assert len(assigned) > 20
    assert assigned - with_setters - {"__class__"} <= KNOWN


BAD: list[tuple[str, Any, str]] = [
    ("_fake_quant", False, "mtq.compress"),
    ("_dequantize", True, "mtq.compress"),
    ("_scale", torch.ones(2), "mtq.compress"),
    ("_double_scale", torch.ones(2), "mtq.compress"),
    ("_scale_zeros", torch.ones(2), "mtq.compress"),
    ("_svdquant_lora_a", torch.ones(2, 2), "low-rank product"),
    ("_svdquant_lora_b", torch.ones(2, 2), "low-rank product"),
    ("_if_quant", False, r"enable_quant\(\)"),
    ("_learn_amax", True, "calibrate again"),
    ("_bias", {-1: None}, "affine"),
    ("_bias_value", torch.ones(2), "affine"),
    ("backend", "mine", "another program rounds"),
    ("_rotate", True, "Hadamard"),
    ("_rotate", {"enable": True, "block_size": 16}, "Hadamard"),
    ("_block_sizes", {-1: 16, "scale_bits": 8, "scale_block_sizes": {-1: 256}}, "no scheme has"),
    ("_block_sizes", {-1: 16, "type": "dynamic", "scale_bits": (4, 3), "four_over_six": True}, "no scheme has"),
    ("_block_sizes", {-1: 128, "type": "dynamic"}, "no scheme has"),
    ("_pre_quant_scale", torch.full((16,), 2.0), "multiplies the weight"),
    ("_of_tomorrow", 3, "does not know it"),
]
"""Attribute, a value that no export writes, and a part of the message."""


@pytest.mark.parametrize(("attribute", "value", "message"), BAD)
def test_a_value_that_no_export_writes_is_named(attribute: str, value: Any, message: str) -> None:
    quantizer = made()
    if isinstance(value, torch.Tensor):
        quantizer.register_buffer(attribute, value)
    else:
        setattr(quantizer, attribute, value)
    found = refused(quantizer)
    assert re.search(rf"layers\.0\.linear_fc2\.weight_quantizer: {attribute}=.*: .*\n    next step: .", found)
    assert re.search(message, found)


def test_every_bound_was_tried() -> None:
    integers = {"_unsigned", "_narrow_range", "_quantize_scales", "_quant_max_bound"}
    assert {attribute for attribute, _, _ in BAD} - {"_of_tomorrow"} | integers == BOUND.keys()


@pytest.mark.parametrize("attribute", ["_unsigned", "_narrow_range"])
def test_ranges_of_integers(attribute: str) -> None:
    integers = TensorQuantizer(QuantizerAttributeConfig(num_bits=8, axis=0))
    setattr(integers, attribute, True)
    assert attribute in refused(integers)
    floats = made()
    setattr(floats, attribute, True)
    assert not refused(floats)


def test_learned_amax_in_high_precision_or_for_integers() -> None:
    learned = StaticBlockScaleQuantizer.from_tensor_quantizer(made(), torch.tensor(1.0))
    learned.enable_lsq(quantize_scales=False)
    assert "_quantize_scales=False" in refused(learned)
    integers = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 16}))
    integers.amax = torch.ones(8, 1)
    learned = StaticBlockScaleQuantizer.from_tensor_quantizer(integers)
    assert not refused(learned)
    learned.enable_lsq()
    assert "_quant_max_bound=7.0" in refused(learned)


def test_the_older_name_of_static_quantizers() -> None:
    """ModelOpt 0.44 calls the class NVFP4StaticQuantizer."""
    older = type("NVFP4StaticQuantizer", (StaticBlockScaleQuantizer,), {})
    assert not refused(older.from_tensor_quantizer(made(), torch.tensor(1.0)))


def test_a_disabled_quantizer_still_multiplies_and_rotates() -> None:
    quantizer = made(rotate=True)
    quantizer.backend = "mine"
    quantizer.disable()
    message = refused(quantizer)
    assert "_rotate" in message
    assert "backend" not in message
    quantizer.disable_rotate()
    assert not refused(quantizer)
    quantizer.pre_quant_scale = torch.ones(16)
    assert "_pre_quant_scale" in refused(quantizer)
    quantizer._enable_pre_quant_scale = False
    assert not refused(quantizer)


def test_inputs_may_be_multiplied() -> None:
    quantizer = made()
    quantizer.pre_quant_scale = torch.full((16,), 2.0)
    assert not refused(quantizer, "input")
    assert "_pre_quant_scale" in refused(quantizer, "output")


def test_plain_weights_only_mind_what_changes_the_weights() -> None:
    quantizer = made()
    quantizer.backend, quantizer._if_quant = "mine", False
    assert not refused(quantizer, plain=True)
    quantizer._of_tomorrow = 1
    assert "_of_tomorrow=1" in refused(quantizer, plain=True)


def test_other_classes_chains_hooks_and_outputs() -> None:
    class Mine(TensorQuantizer):
        pass

    assert "class=Mine" in refused(Mine(QuantizerAttributeConfig(**NVFP4)))
    chain = refused(SequentialQuantizer(made(), made()))
    assert re.search(r"weight_quantizer: class=SequentialQuantizer", chain)
    hooked = made()
    hooked.register_forward_hook(lambda *_: None)
    assert "_forward_hooks=" in refused(hooked)
    assert "rounds outputs" in refused(made(), "output")


def test_like_quantizers_are_one_row_and_each_counts() -> None:
    layers = [walked(made(backend="mine"))[0] for _ in range(3)]
    named = [
        Quantizer(each.name.replace(".0.", f".{n}."), each.module, 8, (), each.attributes)
        for n, each in enumerate(layers)
    ]
    with pytest.raises(UsageError) as refusal:
        check_quantizers(refusals(named), lambda name: False)
    assert str(refusal.value).startswith("3 attributes of quantizers change what is computed")
    assert str(refusal.value).count("backend=mine") == 1
    assert "layers.*.linear_fc2.weight_quantizer (3 quantizers)" in str(refusal.value)


def test_a_buffer_that_was_not_saved() -> None:
    module = made()
    saved = Quantizer("a.weight_quantizer", module, None, (), {"_disabled": False, "_bias_value": ABSENT})
    (found,) = refusals([saved])
    assert (found.attribute, found.value) == ("_bias_value", "not in the checkpoint")
    module.disable()
    assert not list(refusals([Quantizer("a.weight_quantizer", module, None, (), {"_amax": ABSENT})]))
    assert list(refusals([Quantizer("a.input_quantizer", module, None, (), {"_pre_quant_scale": ABSENT})]))
