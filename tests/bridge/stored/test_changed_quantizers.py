"""Attributes and buffers of quantizers in real checkpoints, each changed: the effect is exported, or named, or none."""

import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.plan.quantizer_gate import BOUND, READ, WITHOUT_EFFECT
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.bridge.stored.test_te_checkpoints import FIXTURES, tensors_of
from tests.support.changed_checkpoint import ChangedCheckpoint

CASES = ("dense_nvfp4", "tp2_nvfp4", "ep2_grouped_nvfp4", "latent_nvfp4", "hybrid_nvfp4")
"""Transformer Engine, one rank and two, dense and grouped experts, latent attention, a hybrid."""
OTHERS: Mapping[str, Any] = {
    "_num_bits": (4, 3),
    "_axis": 0,
    "_block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (4, 3)},
    "_disabled": True,
    "_dynamic": True,
    "_use_constant_amax": True,
    "_fake_quant": False,
    "_dequantize": True,
    "_if_quant": False,
    "_learn_amax": True,
    "_bias": {-1: None},
    "backend": "mine",
    "_rotate": True,
    "_of_tomorrow": 3,
    "_pytorch_state_metadata": {"params": {}, "buffers": {"_bias_value": {}, "_amax": {}}},
    "_narrow_range": True,
    "_unsigned": True,
    "_constant_amax": 3.0,
    "_effective_bits": 9.0,
    "_enable_pre_quant_scale": False,
    "_if_calib": True,
    "_input_dtype": torch.float16,
    "_pass_through_bwd": False,
    "_trt_high_precision_dtype": "Half",
    "backend_extra_args": {"of": "mine"},
}
"""Another value for each attribute that ModelOpt saves of a quantizer."""
NO_EFFECT = frozenset(
    (
        "_axis", "_narrow_range", "_unsigned", "_constant_amax", "_effective_bits", "_enable_pre_quant_scale",
        "_if_calib", "_input_dtype", "_pass_through_bwd", "_trt_high_precision_dtype", "backend_extra_args",
    )
)  # fmt: skip
"""What does not act on a quantizer of floats in blocks, without a vector."""
UNDERSTOOD = frozenset(("_num_bits", "_block_sizes", "_disabled", "_dynamic", "_use_constant_amax"))
BUFFERS: Mapping[str, torch.Tensor] = {
    "_scale": torch.ones(2),
    "_double_scale": torch.ones(1),
    "_scale_zeros": torch.ones(2),
    "_svdquant_lora_a": torch.ones(2, 2),
    "_svdquant_lora_b": torch.ones(2, 2),
    "_bias_value": torch.ones(1),
    "_of_tomorrow": torch.ones(3),
}
"""Buffers that no export writes."""


def unpacked(case: str, directory: Path) -> Path:
    with tarfile.open(FIXTURES / f"{case}.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory / case


def exported(directory: Path, out: Path, *, dry_run: bool = False) -> str | dict[str, str]:
    """The tensors, or what was raised."""
    scheme = json.loads((directory / "expected.json").read_text())["scheme"]
    shutil.rmtree(out, ignore_errors=True)
    try:
        bridge = AutoBridge.from_hf_pretrained(directory)
        bridge.convert_checkpoint(directory / "checkpoint", out, scheme=scheme, dry_run=dry_run)
    except AmaxbridgeError as error:
        return str(error)
    return {} if dry_run else tensors_of(out)


@pytest.mark.parametrize("case", CASES)
def test_every_attribute(case: str, tmp_path: Path) -> None:
    directory = unpacked(case, tmp_path)
    expected = json.loads((directory / "expected.json").read_text())["tensors"]
    checkpoint = ChangedCheckpoint(directory / "checkpoint")
    states = checkpoint.quantizer_states()
    module, quantizers = next((key, held) for key, held in states.items() if "linear_fc2" in key)
    found = {name for held in states.values() for setting in held.values() for name in setting}
    assert found <= OTHERS.keys() <= BOUND.keys() | READ | WITHOUT_EFFECT.keys() | {"_of_tomorrow"}
    tried = 0
    for quantizer, setting in quantizers.items():
        if quantizer.endswith(".1"):
            continue  # a grouped expert's, whose own state decides
        for name in OTHERS.keys() - NO_EFFECT:
            value = OTHERS[name] if name != "_disabled" else not setting["_disabled"]

            def change(held: dict[str, Any], quantizer: str = quantizer, name: str = name, value: Any = value) -> None:
                held[quantizer][name] = value

            if setting["_disabled"] and name not in ("_disabled", "_rotate", "_dequantize", "_of_tomorrow"):
                continue
            checkpoint.change({module: change}, {})
            tried += 1
            said = exported(directory, tmp_path / "out", dry_run=name not in UNDERSTOOD)
            if name == "_dynamic" and quantizer.startswith("weight"):
                assert said == expected  # ModelOpt takes the amax that is there all the same
            elif name in UNDERSTOOD:
                assert said != expected, f"{quantizer}.{name}={value} is lost"
            else:
                named = "_bias_value" if name == "_pytorch_state_metadata" else name
                assert f"{named}=" in str(said), f"{quantizer}.{name}={value}: {said}"
    assert tried >= 2 * 14 + 4


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_effect_changes_no_byte(case: str, tmp_path: Path) -> None:
    """All of it at once, in every quantizer of floats; and everything on disabled ones that does not act there."""
    directory = unpacked(case, tmp_path)
    checkpoint = ChangedCheckpoint(directory / "checkpoint")

    def change(held: dict[str, Any]) -> None:
        for setting in held.values():
            acts = ("_disabled", "_rotate", "_dequantize", "_of_tomorrow", "_pytorch_state_metadata")
            names = OTHERS.keys() - acts if setting["_disabled"] else NO_EFFECT
            setting.update({name: OTHERS[name] for name in names})

    states = checkpoint.quantizer_states()
    assert len(states) >= 4
    checkpoint.change(dict.fromkeys(states, change), {})
    assert exported(directory, tmp_path / "out") == json.loads((directory / "expected.json").read_text())["tensors"]


@pytest.mark.parametrize("case", CASES[:2])
def test_every_buffer(case: str, tmp_path: Path) -> None:
    directory = unpacked(case, tmp_path)
    expected = json.loads((directory / "expected.json").read_text())["tensors"]
    checkpoint = ChangedCheckpoint(directory / "checkpoint")
    module, quantizers = next((key, held) for key, held in checkpoint.quantizer_states().items() if "linear_fc2" in key)
    owner = module.partition("._extra_state")[0]
    for quantizer in quantizers:
        for name, tensor in BUFFERS.items():
            if name == "_bias_value" and quantizers[quantizer]["_disabled"]:
                continue  # acts with the rounding alone
            checkpoint.change({}, {f"{owner}.{quantizer}.{name}": tensor})
            assert f"{name}=a tensor" in str(exported(directory, tmp_path / "out", dry_run=True)), (quantizer, name)
    enabled = [name for name, setting in quantizers.items() if not setting["_disabled"]]
    assert len(enabled) >= 2
    for quantizer in enabled:
        checkpoint.change({}, {f"{owner}.{quantizer}._amax": torch.tensor([64.0])})
        assert exported(directory, tmp_path / "out") != expected, quantizer
