"""Look-ups in both directions, refusal of overlaps, and the families' golden tables of names."""

import pytest

from amaxbridge.mappings import (
    AmaxFanoutMapping,
    DirectMapping,
    MappingRegistry,
    MegatronParamMapping,
    MoeAmaxFanoutMapping,
    QKVMapping,
)
from amaxbridge.mappings.errors import AmbiguousMappingError, UnknownArchitectureError
from amaxbridge.mappings.families import FAMILIES, family_of
from amaxbridge.mappings.fused_groups import group_of, groups_among
from tests.support.paths import GOLDEN


def test_look_up_in_both_directions() -> None:
    registry = family_of({"architectures": ["Qwen3ForCausalLM"]}).registry
    qkv = registry.megatron_to_hf_lookup("decoder.layers.11.self_attention.linear_qkv.weight")
    assert isinstance(qkv, QKVMapping)
    assert qkv.k == "model.layers.11.self_attn.k_proj.weight"
    assert registry.hf_to_megatron_lookup(qkv.k) == qkv
    amax = registry.hf_to_megatron_lookup("model.layers.3.mlp.up_proj.input_quantizer._amax")
    assert isinstance(amax, AmaxFanoutMapping)
    assert amax.megatron_param == "decoder.layers.3.mlp.linear_fc1.input_quantizer._amax"
    assert registry.megatron_to_hf_lookup("decoder.layers.x.mlp.linear_fc1.weight") is None
    assert registry.hf_to_megatron_lookup("model.layers.3.mlp.gate_up_proj.weight") is None


@pytest.mark.parametrize(
    ("megatron", "targets"),
    [
        ("self_attention.core_attention.k_bmm_quantizer._amax", ["self_attn.k_bmm_quantizer._amax"]),
        ("self_attention.core_attention.v_bmm_quantizer._amax", ["self_attn.v_bmm_quantizer._amax"]),
        (
            "self_attention.linear_qkv.output_quantizer._amax",
            [f"self_attn.{p}_proj.output_quantizer._amax" for p in "qkv"],
        ),
        (
            "mlp.experts.linear_fc1.weight_quantizer.9._amax",
            [f"mlp.experts.9.{p}_proj.weight_quantizer._amax" for p in ("gate", "up")],
        ),
        (
            "mlp.experts.linear_fc2.input_quantizer._pre_quant_scale",
            ["mlp.experts.*.down_proj.input_quantizer._pre_quant_scale"],
        ),
        ("mlp.linear_fc2.input_quantizer._pre_quant_scale", ["mlp.down_proj.input_quantizer._pre_quant_scale"]),
    ],
)
def test_every_quantizer_that_modelopt_inserts_has_a_name(megatron: str, targets: list[str]) -> None:
    registry = family_of({"architectures": ["Qwen3MoeForCausalLM"]}).registry
    found = registry.megatron_to_hf_lookup(f"decoder.layers.3.{megatron}")
    assert found is not None
    assert list(found.targets) == [f"model.layers.3.{target}" for target in targets]


def test_the_expert_of_a_shared_quantizer_is_dropped_on_the_way_back() -> None:
    registry = MappingRegistry(MoeAmaxFanoutMapping("d.*.fc1.q._amax", ["m.*.experts.*.up._amax"]))
    found = registry.hf_to_megatron_lookup("m.4.experts.7.up._amax")
    assert found is not None
    assert found.megatron_param == "d.4.fc1.q._amax"


@pytest.mark.parametrize(
    "mappings",
    [
        [DirectMapping("a.*.w", "x.*.w"), DirectMapping("a.3.w", "y.w")],
        [DirectMapping("a.w", "x.w"), DirectMapping("b.w", "x.w")],
        [DirectMapping("a.*.w", "x.*.w"), DirectMapping("**.w", "y.**.w")],
    ],
    ids=["Megatron names", "Hugging Face names", "a path wildcard"],
)
def test_overlapping_patterns_are_refused(mappings: list[MegatronParamMapping]) -> None:
    with pytest.raises(AmbiguousMappingError, match="overlap"):
        MappingRegistry(*mappings)


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"Qwen4ForCausalLM.*Qwen3ForCausalLM"):
        family_of({"architectures": ["Qwen4ForCausalLM"]})
    with pytest.raises(UnknownArchitectureError, match="none given"):
        family_of({})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architectures[0])
def test_names_as_committed(family: object) -> None:
    """A change of a mapping shows in the diff of its golden table. To renew it: delete the file and run again."""
    from amaxbridge.mappings.family import ModelFamily

    assert isinstance(family, ModelFamily)
    rows = [
        f"{mapping.megatron_param}\n" + "".join(f"    {t}\n" for t in mapping.targets) for mapping in family.registry
    ]
    file = GOLDEN / f"names_{family.architectures[0]}.txt"
    if not file.exists():
        file.write_text("".join(rows))
        pytest.fail(f"{file.name} did not exist; it is written now: read it and commit it")
    assert "".join(rows) == file.read_text()


@pytest.mark.parametrize(
    ("module", "members"),
    [
        ("m.0.self_attn.k_proj", ["q_proj", "k_proj", "v_proj"]),
        ("m.0.mlp.experts.3.up_proj", ["gate_proj", "up_proj"]),
        ("m.0.block_sparse_moe.experts.1.w3", ["w1", "w3"]),
        ("m.0.self_attn.kv_a_proj_with_mqa", ["q_a_proj", "kv_a_proj_with_mqa"]),
        ("m.0.linear_attn.in_proj_z", ["in_proj_qkv", "in_proj_z"]),
        ("m.0.linear_attn.in_proj_a", ["in_proj_b", "in_proj_a"]),
        ("m.0.mlp.down_proj", ["down_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_fused_groups(module: str, members: list[str]) -> None:
    parent = module.rpartition(".")[0]
    assert group_of(module).members == tuple(f"{parent}.{member}" if parent else member for member in members)


def test_groups_hold_only_what_is_there() -> None:
    groups = groups_among(["a.v_proj", "a.q_proj", "b.q_proj", "a.o_proj"])
    assert [group.members for group in groups] == [("a.q_proj", "a.v_proj"), ("b.q_proj",), ("a.o_proj",)]
