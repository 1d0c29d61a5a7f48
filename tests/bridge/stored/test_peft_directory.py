"""Adapters written alone: PEFT loads them, and the model computes what the merged weights compute."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.export.disk.staging import Share
from amaxbridge.export.output.peft_directory import NAMES_OF_EXPERTS, PACKED_BY_PEFT
from amaxbridge.mappings.errors import MappingError, UsageError
from tests.support.adapters import ALPHA, Adapted, adapters_for
from tests.support.checkpoints import tensors_in
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS

TOKENS = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(3))


def write(
    name: str, root: Path, adapted: Adapted | None, *, kind: str = "lora", whole: bool = False, **more: Any
) -> Path:
    """Writes adapters of a tiny model alone; its config.json is in hf."""
    TINY_MODELS[name].make().save_pretrained(root / "hf")
    model = read_hf_model(root / "hf")
    made = adapters_for(model, kind.replace("attention", "lora")) if adapted is None else adapted
    if kind == "attention":
        made.megatron = {key: each for key, each in made.megatron.items() if re.search("in_proj|self_attention", key)}
    write_state(root / "checkpoint", {**(megatron_state(model, torch.float32) if whole else {}), **made.megatron})
    AutoBridge(model).convert_checkpoint(
        root / "checkpoint", root / "adapters", **{"adapter": "only", "adapter_alpha": ALPHA, **more}
    )
    return root / "adapters"


def logits(base: Path, adapters: Path | None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapters is not None:
        model = PeftModel.from_pretrained(model, str(adapters))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen3", "lora"),
        ("Qwen3", "dora"),
        ("Qwen3", "canonical"),
        ("Phi-3", "lora"),
        ("Qwen3-MoE", "lora"),
        ("Nemotron-H", "attention"),
        ("Gemma 3", "lora"),
    ],
)
def test_peft_computes_what_merged_weights_compute(name: str, kind: str, tmp_path: Path) -> None:
    adapters = write(name, tmp_path, None, kind=kind, whole=True)
    assert {each.name for each in adapters.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
    merged = {"adapter": "merge", "adapter_alpha": ALPHA}
    how: Any = {"scheme": "none", "dtype": "float32"}
    bridge.convert_checkpoint(tmp_path / "checkpoint", tmp_path / "merged", **how, **merged)
    write_state(tmp_path / "base", megatron_state(read_hf_model(tmp_path / "hf"), torch.float32))
    bridge.convert_checkpoint(tmp_path / "base", tmp_path / "plain", **how)
    plain, both = logits(tmp_path / "plain", None), logits(tmp_path / "plain", adapters)
    expected = logits(tmp_path / "merged", None)
    assert (plain - expected).abs().max() > 0.03
    assert (both - expected).abs().max() < 1e-5


def refused(name: str, root: Path, adapted: Adapted | None = None, **options: Any) -> str:
    with pytest.raises((MappingError, UsageError)) as error:
        write(name, root, adapted, **options)
    assert not (root / "adapters").exists()
    return str(error.value)


def test_what_peft_cannot_express(tmp_path: Path) -> None:
    message = refused("Qwen3-MoE", tmp_path / "dora", kind="dora")
    assert "PEFT cannot express 48 adapters" in message
    assert "experts have no DoRA in PEFT" in message
    assert "adapter=merge writes the merged weights" in message
    for name in ("GPT-OSS", "Qwen1.5-MoE"):
        assert "PEFT has no adapters of single experts for this architecture" in refused(name, tmp_path / name)
    message = refused("Nemotron-H", tmp_path / "mamba")
    assert "backbone.layers.0.mixer.out_proj: PEFT takes no adapter of it" in message
    message = refused("DeepSeek-V3", tmp_path / "dense")
    assert "model.layers.0.mlp.gate_proj: PEFT would take it for a module of experts" in message
    assert "model.layers.1.mlp.shared_experts.up_proj: PEFT would take it" in message


def test_the_table_of_models_is_pefts_own() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    targets = conversion._MOE_TARGET_MODULE_MAPPING
    known = {name for name, form in conversion._MODEL_TO_CONVERSION_PATTERN.items() if form in targets}
    assert known >= PACKED_BY_PEFT
    assert {name for form in targets.values() for name in form} == NAMES_OF_EXPERTS


def test_adapters_of_another_model(tmp_path: Path) -> None:
    name = "decoder.layers.0.self_attention.linear_proj.adapter"
    parts = {f"{name}.linear_in.weight": torch.ones(4, 128), f"{name}.linear_out.weight": torch.ones(80, 4)}
    message = refused("Qwen3", tmp_path, Adapted(parts))
    assert "o_proj.lora_B.weight is [80, 4] float32, not [64, 4]" in message


def test_some_modules_and_another_rank(tmp_path: Path) -> None:
    """Modules of one name that differ are targeted one by one, and patterns give their ranks and alphas."""
    parts, proj = {}, "decoder.layers.{}.self_attention.linear_proj.adapter"
    for layer, rank in ((0, 4), (1, 2)):
        parts[f"{proj.format(layer)}.linear_in.weight"] = torch.ones(rank, 128)
        parts[f"{proj.format(layer)}.linear_out.weight"] = torch.ones(64, rank)
    fc2 = "decoder.layers.1.mlp.linear_fc2.adapter"
    parts |= {f"{fc2}.linear_in.weight": torch.ones(4, 96), f"{fc2}.linear_out.weight": torch.ones(64, 4)}
    adapters = write("Qwen3", tmp_path, Adapted(parts))
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "layers.0.self_attn.o_proj",
        "layers.1.mlp.down_proj",
        "layers.1.self_attn.o_proj",
    ]
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == {"layers.1.self_attn.o_proj": 2}
    assert config["alpha_pattern"] == {}
    tensors = tensors_in(adapters)
    assert len(tensors) == 6
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    how: Any = {"scheme": "none", "dtype": "float32", "adapter": "merge", "adapter_alpha": ALPHA}
    bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
    state = megatron_state(read_hf_model(tmp_path / "hf"), torch.float32)
    write_state(tmp_path / "base", state)
    write_state(tmp_path / "whole", {**state, **parts})
    bridge.convert_checkpoint(tmp_path / "whole", tmp_path / "merged", **how)
    bridge.convert_checkpoint(tmp_path / "base", tmp_path / "plain", scheme="none", dtype="float32")
    assert (logits(tmp_path / "plain", adapters) - logits(tmp_path / "merged", None)).abs().max() < 1e-5


def test_a_run_that_was_interrupted_continues(tmp_path: Path) -> None:
    """Two processes share the bundles, one after the other."""
    adapters = write("Qwen3", tmp_path, None, share=Share(1, 2))
    assert not adapters.exists()
    bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
    how: Any = {"adapter": "only", "adapter_alpha": ALPHA}
    bridge.convert_checkpoint(tmp_path / "checkpoint", adapters, share=Share(0, 2), **how)
    alone = tmp_path / "alone"
    bridge.convert_checkpoint(tmp_path / "checkpoint", alone, **how)
    assert (adapters / "adapter_model.safetensors").read_bytes() == (alone / "adapter_model.safetensors").read_bytes()
