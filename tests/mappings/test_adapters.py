"""Mappings of adapters: names, and the law that shards of any number of ranks join to what they were split from."""

from pathlib import Path

import pytest
import torch

from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.mappings.adapters import AdaptedRegistry, AdapterMapping, Side, adapter_tensor, is_adapter, without_side
from amaxbridge.mappings.canonical import canonical
from tests.support.adapters import LINEARS
from tests.support.tiny_models import TINY_MODELS

EXPERT = "decoder.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("name", "weight", "adapter", "side", "role"),
    [
        ("a.linear_qkv.adapter.linear_in.weight", "a.linear_qkv.weight", "a.linear_qkv.adapter", Side.A, ""),
        ("a.fc.adapter.weight_magnitude", "a.fc.weight", "a.fc.adapter", Side.LENGTHS, ""),
        ("a.fc.adapter.adapter_up.linear_out.weight", "a.fc.weight", "a.fc.adapter.adapter_up", Side.B, "up"),
        ("a.fc.lora_b_one_two.weight", "a.fc.weight", "a.fc.one_two", Side.B, ""),
        (
            f"{EXPERT}.local_experts.3.linear_fc1.adapter.linear_in.weight",
            f"{EXPERT}.linear_fc1.weight3",
            f"{EXPERT}.linear_fc1.adapter.3",
            Side.A,
            "",
        ),
        (
            f"{EXPERT}.local_experts.3.linear_fc2.lora_a_x.weight",
            f"{EXPERT}.linear_fc2.weight3",
            f"{EXPERT}.linear_fc2.x.3",
            Side.A,
            "",
        ),
    ],
)
def test_what_names_say(name: str, weight: str, adapter: str, side: Side, role: str) -> None:
    found = adapter_tensor(canonical(name))
    assert is_adapter(name) and found is not None
    assert (found.weight, found.adapter, found.side, found.role) == (weight, adapter, side, role)


@pytest.mark.parametrize("name", ["a.linear_qkv.weight", "a.adapter.linear_in.bias", "a.q_lora_rank.weight"])
def test_other_names(name: str) -> None:
    assert adapter_tensor(name) is None
    assert is_adapter(name) == (".adapter." in name)


def test_modules_of_parts() -> None:
    assert without_side("a.q_proj.lora_A") == without_side("a.q_proj") == "a.q_proj"


@pytest.mark.parametrize("model", ["Qwen3", "Phi-3", "DeepSeek-V3", "Qwen3-Next", "Nemotron-H"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_join_to_what_they_were_split_from(model: str, ranks: int, tmp_path: Path) -> None:
    TINY_MODELS[model].make().save_pretrained(tmp_path)
    hf = read_hf_model(tmp_path)
    specs, registry, generator = MegatronSpecs(hf, hf.model_config), AdaptedRegistry(hf.registry), torch.Generator()
    seen = 0
    for name, weight in specs.mappings.items():
        if LINEARS.fullmatch(name) is None:
            continue
        rows = weight.join([torch.empty(specs.shard(name, 1).shape, device="meta")], hf.model_config)
        columns, module = specs.shard(name, 1).shape[1], name.removesuffix(".weight")
        parts = ("adapter.linear_in.weight", "adapter.linear_out.weight", "adapter.weight_magnitude")
        for part in (*parts, "lora_a_x.weight", "lora_b_x.weight"):
            stem, dot, number = module.rpartition(".weight")
            mapping = registry.megatron_to_hf_lookup(f"{stem}.{part}{number}" if dot else f"{module}.{part}")
            assert isinstance(mapping, AdapterMapping)
            shared = torch.randn(4, columns, generator=generator)
            tensors = {}
            for target, whole in zip(mapping.targets, rows.values(), strict=True):
                shapes = {Side.A: (4, columns), Side.B: (len(whole), 4), Side.LENGTHS: (len(whole),)}
                made = torch.randn(shapes[mapping.tensor.side], generator=generator)
                tensors[target] = shared if mapping.tensor.side is Side.A else made
            count = ranks if mapping.shard_dim is not None else 1
            shards = [mapping.split(tensors, hf.model_config, rank, count) for rank in range(count)]
            joined = mapping.join(shards, hf.model_config)
            assert joined.keys() == tensors.keys()
            assert all(torch.equal(joined[target], tensor) for target, tensor in tensors.items()), (
                mapping.megatron_param
            )
            seen += 1
    assert seen >= 10
