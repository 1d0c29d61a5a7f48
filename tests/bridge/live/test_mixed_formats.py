"""Several formats in one checkpoint, as AutoQuantize chooses them layer by layer; groups that mix formats."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.schemes.targets import is_targeted
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import MappingError
from tests.support.checkpoints import tensors_in
from tests.support.hf_models import make_qwen3, make_qwen3_moe
from tests.support.launcher import Launcher, LiveRanks
from tests.workers.model import TOKENS

FORMATS = {"float-quantized": "fp8", "nvfp4-pack-quantized": "nvfp4"}


class Models:
    """The ranks of each model, started when first asked for."""

    def __init__(self, launch: Launcher, root: Path) -> None:
        self._launch, self._root = launch, root
        self._made: dict[str, LiveRanks] = {}

    def __getitem__(self, name: str) -> LiveRanks:
        if name not in self._made:
            hf = self._root / name
            (make_dense if name == "dense" else make_experts)(hf)
            self._made[name] = LiveRanks(self._launch, "live_mixed.py", hf, self._root / f"{name}_ranks")
        return self._made[name]


def make_dense(hf: Path) -> None:
    """A model whose weights have a largest element with exact scales in both formats, so that forwards can be compared.

    Where they differ by an ulp, inputs of the next layer cross edges of the 4-bit grid.
    """
    make_qwen3(hf)
    tensors = tensors_in(hf)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor[0, 0] = 448 / 1024
            assert tensor.abs().max() == 448 / 1024, name
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


def make_experts(hf: Path) -> None:
    make_qwen3_moe(hf, {"num_hidden_layers": 3, "mlp_only_layers": [0], "num_experts": 2, "num_experts_per_tok": 2})


@pytest.fixture(scope="module")
def models(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(launch, tmp_path_factory.mktemp("mixed"))


def quantization(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def schemes_in(directory: Path) -> dict[str, str]:
    """Linear module → the scheme that config.json says, `none` if it is ignored; each must be in exactly one place."""
    config, found = quantization(directory), dict[str, str]()
    names = {re.sub(r"\.weight(_packed)?$", "", name) for name in tensors_in(directory)}
    for module in names:
        if module.endswith(("_proj", "mlp.gate", "lm_head")):
            groups = [each for each in config["config_groups"].values() if is_targeted(module, each["targets"])]
            ignored = is_targeted(module, config["ignore"])
            assert len(groups) + ignored == 1 or (groups[0]["targets"] == ["Linear"] and len(groups) == 1), module
            found[module] = "none" if ignored else FORMATS[groups[0]["format"]]
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_every_module_has_the_format_that_was_chosen(models: Models, model: str, tp: int) -> None:
    directory = models[model].at(tp=tp)
    chosen = models[model].report(tp=tp)["chosen"]
    found = schemes_in(directory / "searched")
    bridge = AutoBridge.from_hf_pretrained(models[model].hf)
    compared = 0
    for name, its in chosen.items():
        module = name.removesuffix(".quant_recipe")
        form = "nvfp4" if its.startswith("NVFP4") else "fp8" if its.startswith("FP8") else "none"
        experts = range(2) if "local_experts" in module else [None]
        for expert in experts:
            for linear in [module] if expert is None else ["linear_fc1", "linear_fc2"]:
                if expert is not None:
                    linear = f"{module.partition('.local_experts')[0]}.{linear}"
                weight = f"{linear}.weight{'' if expert is None else expert}"
                mapping = bridge.hf.registry.megatron_to_hf_lookup(weight)
                assert mapping is not None, weight
                for target in mapping.targets:
                    assert found[target.removesuffix(".weight")] == form, target
                    compared += 1
    assert compared == len([each for each in found if not each.endswith("mlp.gate")])
    assert set(found.values()) == {"nvfp4", "fp8", "none"}, "all three must occur for this to show anything"
    assert quantization(directory / "searched")["format"] == "mixed-precision"


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_weights_are_those_of_the_fake_quantizers(models: Models, model: str) -> None:
    directory = models[model].at(tp=1)
    oracle, written = load_file(directory / "searched.safetensors"), tensors_in(directory / "searched")
    found, compared = schemes_in(directory / "searched"), 0
    for module, scheme in found.items():
        prefix = f"{module}."
        local = {name.removeprefix(prefix): each for name, each in written.items() if name.startswith(prefix)}
        if scheme == "none":
            assert f"{module}.weight.fake" not in oracle
        else:
            rounding = 2**-7 if scheme == "fp8" else 0  # ModelOpt divides by 448 / amax; engines multiply by amax / 448
            found_weight, expected = SCHEMES[scheme].dequantize(local), oracle[f"{module}.weight.fake"]
            torch.testing.assert_close(found_weight, expected, rtol=rounding, atol=0)
            compared += 1
    assert compared == sum(name.endswith(".fake") for name in oracle) > 7


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("model", "case"), [("dense", "searched"), ("experts", "searched"), ("experts", "experts")])
def test_a_checkpoint_gives_the_same_bytes(models: Models, tmp_path: Path, model: str, case: str, tp: int) -> None:
    directory, bridge = models[model].at(tp=tp), AutoBridge.from_hf_pretrained(models[model].hf)
    checkpoint, options = directory / f"{case}_checkpoint", {"mixed_groups": "unquantized"} if case == "experts" else {}
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", scheme="auto", **options)  # type: ignore[arg-type]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / case / name).read_bytes(), name


@pytest.mark.parametrize(("model", "case"), [("dense", "searched"), ("experts", "searched"), ("experts", "experts")])
def test_engines_read_every_module_in_its_group(models: Models, model: str, case: str) -> None:
    """vLLM and SGLang ask for fused layers and the first expert under names of their own."""
    report = verify(models[model].at(tp=1) / case)
    for engine in ("vllm", "sglang"):
        assert report.verdict_of(engine).serves, report.verdict_of(engine).failures


def test_transformers_computes_what_the_quantized_model_does(models: Models, transformers: ModuleType) -> None:
    """Activations are fp32 on both sides, as in `test_megatron`."""
    directory = models["dense"].at(tp=1)
    expected = load_file(directory / "searched.safetensors")["logits"]

    def error(path: Path) -> float:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(loading.values()), loading
        with torch.no_grad():
            model(TOKENS)  # compressed-tensors decompresses on the first call, always to bf16
            torch.nn.Module.float(model)  # transformers' own refuses quantized models
            for name, tensor in tensors_in(path).items():
                if name.endswith(".input_scale"):  # rounded to bf16 when it was loaded, as no engine does
                    model.get_parameter(name).copy_(tensor)
            found: Tensor = model(TOKENS).logits
        return float((found - expected).norm() / expected.norm())

    assert error(directory / "searched") < 0.01
    assert error(models["dense"].hf) > 0.05, "quantization must matter here"


@pytest.mark.parametrize("tp", [1, 2])
def test_experts_with_several_formats_are_refused_or_unified(models: Models, tp: int) -> None:
    directory = models["experts"].at(tp=tp)
    message = models["experts"].report(tp=tp)["refused"]
    assert message.startswith("fused groups must be quantized as one:\n  model.layers.1.mlp.experts.0.gate_proj")
    assert "model.layers.1.mlp.experts.1.down_proj as fp8" in message
    assert "mixed_groups=unquantized" in message
    found = schemes_in(directory / "experts")
    mixed = {module for module, scheme in found.items() if ".layers.1.mlp.experts." in module}
    assert len(mixed) == 6
    assert {found[module] for module in mixed} == {"none"}
    others = [module for module in found if module.endswith("_proj") and module not in mixed]
    assert {found[module] for module in others} == {"nvfp4"}
    source, written = tensors_in(models["experts"].hf), tensors_in(directory / "experts")
    for module in mixed:
        assert torch.equal(written[f"{module}.weight"], source[f"{module}.weight"])
    card = (directory / "experts" / "README.md").read_text()
    assert "their fused groups have several formats | `model.layers.*.mlp.experts.*.gate_proj`" in card


def test_a_checkpoint_with_mixed_experts_is_refused_as_live(models: Models, tmp_path: Path) -> None:
    directory, bridge = models["experts"].at(tp=1), AutoBridge.from_hf_pretrained(models["experts"].hf)
    with pytest.raises(MappingError) as refusal:
        bridge.convert_checkpoint(directory / "experts_checkpoint", tmp_path / "out", scheme="auto")
    assert str(refusal.value) == models["experts"].report(tp=1)["refused"]
