"""Adapters merged and quantized in one go: the bytes of merging first and exporting then."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import AmaxError, MappingError, UsageError
from tests.support.adapters import ALPHA, LINEARS, adapters_for, merged_by_peft
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_tensors
from tests.support.stored_checkpoints import megatron_state, spelling, write_state
from tests.support.tiny_models import TINY_MODELS

NVFP4 = {"_disabled": False, "_num_bits": (2, 1), "_axis": None}
NVFP4 |= {"_block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FP8_ROWS = {"_disabled": False, "_num_bits": (4, 3), "_axis": 0, "_block_sizes": None}
FP8_TOKENS = {
    "_disabled": False,
    "_num_bits": (4, 3),
    "_axis": None,
    "_block_sizes": {-1: None, "type": "dynamic"},
    "_dynamic": True,
}

type AmaxOf = Callable[[Tensor], Tensor]


def largest(weight: Tensor) -> Tensor:
    return weight.abs().max().float().reshape(1)


def of_rows(weight: Tensor) -> Tensor:
    return weight.abs().amax(1, keepdim=True).float()


def wide(weight: Tensor) -> Tensor:
    del weight
    return torch.tensor([50.0])


class Road:
    """A tiny model, its adapters, and what the two are merged."""

    def __init__(self, name: str, kind: str, root: Path) -> None:
        self.root, self.hf = root, root / "hf"
        TINY_MODELS[name].make().save_pretrained(self.hf)
        self.bridge = AutoBridge.from_hf_pretrained(self.hf)
        model = read_hf_model(self.hf)
        self.state, self.adapted = megatron_state(model), adapters_for(model, kind)
        self.bridge.convert_checkpoint(write_state(root / "base", self.state), root / "plain", scheme="none")
        plain = tensors_in(root / "plain")
        merged = {f"{module}.weight": weight for module, weight in merged_by_peft(plain, self.adapted).items()}
        spelled, self.merged = spelling(model), dict(self.state)
        for name, mapping in MegatronSpecs(model, model.model_config).mappings.items():
            if LINEARS.fullmatch(name):
                parts = {target: merged[target].bfloat16() for target in mapping.targets}
                self.merged[spelled(name)] = mapping.split(parts, model.model_config, 0, 1).contiguous()
        self.linears = [
            spelled(name) for name in MegatronSpecs(model, model.model_config).mappings if LINEARS.fullmatch(name)
        ]

    def quantized(self, name: str, weights: dict[str, Tensor], amax_of: AmaxOf, inputs: Any, own: Any) -> Path:
        """A checkpoint of these weights with quantizers, whose amax are those of their own weights."""
        state: dict[str, Any] = dict(weights)
        for linear in self.linears:
            module = linear.removesuffix(".weight")
            saved = io.BytesIO()
            torch.save({"modelopt_quantizer_state": {"weight_quantizer": own, "input_quantizer": inputs}}, saved)
            state[f"{module}._extra_state/shard_0_1"] = saved
            state[f"{module}.weight_quantizer._amax"] = amax_of(weights[linear])
            if not inputs.get("_dynamic"):
                state[f"{module}.input_quantizer._amax"] = torch.tensor([3.0])
        return write_state(self.root / name, state)


@pytest.fixture(scope="module", params=[("Qwen3", "lora"), ("Qwen3", "dora"), ("Qwen1.5-MoE", "lora")], ids="-".join)
def road(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Road:
    return Road(*request.param, tmp_path_factory.mktemp("road"))


def export(road: Road, checkpoint: Path, output: Path, scheme: str, **options: Any) -> Path:
    road.bridge.convert_checkpoint(checkpoint, output, scheme=scheme, **options)
    return output


def test_amax_that_cover(road: Road, tmp_path: Path) -> None:
    both = road.quantized("covered", {**road.state, **road.adapted.megatron}, wide, NVFP4, NVFP4)
    apart = road.quantized("covered_merged", road.merged, wide, NVFP4, NVFP4)
    once = export(road, both, tmp_path / "once", "nvfp4", adapter="merge", adapter_alpha=ALPHA)
    same_tensors(once, export(road, apart, tmp_path / "twice", "nvfp4"))
    assert "remeasure" not in (once / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_dynamic"])
def test_amax_taken_anew(road: Road, scheme: str, tmp_path: Path) -> None:
    """Refused by default; then as if the merged model had been calibrated by its largest weights."""
    kind = (largest, NVFP4, NVFP4) if scheme == "nvfp4" else (of_rows, FP8_TOKENS, FP8_ROWS)
    both = road.quantized(f"{scheme}_both", {**road.state, **road.adapted.megatron}, *kind)
    apart = road.quantized(f"{scheme}_merged", road.merged, *kind)
    merge = {"adapter": "merge", "adapter_alpha": ALPHA}
    with pytest.raises(AmaxError, match="larger than the amax of training") as error:
        export(road, both, tmp_path / "once", scheme, **merge)
    assert "_proj: " in str(error.value)
    assert "amax.weights=remeasure" in str(error.value)
    once = export(road, both, tmp_path / "once", scheme, weight_amax="remeasure", **merge)
    same_tensors(once, export(road, apart, tmp_path / "twice", scheme))
    assert (
        "come from the merged weights, not from training (amax.weights=remeasure)" in (once / "README.md").read_text()
    )


def test_without_data(road: Road, tmp_path: Path) -> None:
    both = write_state(road.root / "unquantized", {**road.state, **road.adapted.megatron})
    merge = {"adapter": "merge", "adapter_alpha": ALPHA}
    once = export(road, both, tmp_path / "once", "nvfp4a16", **merge)
    plain = export(road, both, tmp_path / "plain", "none", **merge)
    model_free_ptq(plain, tmp_path / "twice", "nvfp4a16", device="cpu")
    same_tensors(once, tmp_path / "twice")


def test_what_is_refused(tmp_path: Path) -> None:
    road = Road("Qwen3", "lora", tmp_path)
    checkpoint = road.quantized("checkpoint", {**road.state, **road.adapted.megatron}, wide, NVFP4, NVFP4)
    for expected, options in {
        "unknown policy amax.weights=new; known: stored, remeasure": {"adapter": "merge", "weight_amax": "new"},
        "amax.weights=remeasure is for merged weights": {"weight_amax": "remeasure"},
    }.items():
        with pytest.raises(UsageError, match=expected):
            export(road, checkpoint, tmp_path / "out", "nvfp4", **options)
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_multiplied(tmp_path: Path) -> None:
    """AWQ multiplies the inputs of the linear, not those of its adapter: one merged weight cannot do both."""
    road = Road("Qwen3", "lora", tmp_path)
    checkpoint = {**road.state, **road.adapted.megatron}
    fc1 = "decoder.layers.0.mlp.linear_fc1"
    saved = io.BytesIO()
    vector = {"_disabled": True, "_enable_pre_quant_scale": True}
    torch.save(
        {"modelopt_quantizer_state": {"weight_quantizer": {"_disabled": True}, "input_quantizer": vector}}, saved
    )
    state: dict[str, Any] = {**checkpoint, f"{fc1}._extra_state/shard_0_1": saved}
    state[f"{fc1}.input_quantizer._pre_quant_scale"] = torch.full((64,), 2.0)
    write_state(tmp_path / "awq", state)
    with pytest.raises(MappingError, match=r"the inputs of .* are multiplied by a vector"):
        export(road, tmp_path / "awq", tmp_path / "out", "none", adapter="merge", adapter_alpha=ALPHA)


def test_quantizers_inside_adapters(tmp_path: Path) -> None:
    road = Road("Qwen3", "lora", tmp_path)
    inside = "decoder.layers.0.mlp.linear_fc1.adapter.linear_in"
    for name, disabled in (("enabled", False), ("disabled", True)):
        saved = io.BytesIO()
        settings = {**NVFP4, "_disabled": disabled}
        torch.save({"modelopt_quantizer_state": {"weight_quantizer": settings}}, saved)
        state: dict[str, Any] = {**road.state, **road.adapted.megatron, f"{inside}._extra_state/shard_0_1": saved}
        if not disabled:
            state[f"{inside}.weight_quantizer._amax"] = torch.tensor([1.0])
        write_state(tmp_path / name, state)
    with pytest.raises(UsageError, match="weight_quantizer: enabled=True: rounds inside an adapter"):
        export(road, tmp_path / "enabled", tmp_path / "out", "none", adapter="merge", adapter_alpha=ALPHA)
    with pytest.raises(UsageError, match="weight_quantizer: enabled=True: rounds inside an adapter"):
        export(road, tmp_path / "enabled", tmp_path / "out", "none", adapter="only", adapter_alpha=ALPHA)
    export(road, tmp_path / "disabled", tmp_path / "out", "none", adapter="merge", adapter_alpha=ALPHA)
