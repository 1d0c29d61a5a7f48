"""Amax mappings: fan-out, maximum, granularity, and how they derive from weight mappings."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amaxbridge.mappings import (
    AmaxFanoutMapping,
    AmaxMapping,
    ColumnParallelMapping,
    DirectMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    MoeAmaxFanoutMapping,
    QKVMapping,
    RowParallelMapping,
    convert_to_amax_map,
)
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.ranks import Axis, ThreadRanks, run_threads

QKV = QKVMapping("d.layers.*.linear_qkv.weight", *(f"m.layers.*.{p}_proj.weight" for p in "qkv"))
CONFIG = ModelConfig(num_attention_heads=4, num_query_groups=2)


def test_conversion_by_rule() -> None:
    weights = [
        QKV,
        RowParallelMapping("d.layers.*.linear_fc2.weight", "m.layers.*.down_proj.weight"),
        GatedMLPMapping(
            "d.layers.*.experts.linear_fc1.weight*",
            "m.layers.*.experts.*.gate.weight",
            "m.layers.*.experts.*.up.weight",
        ),
        DirectMapping("d.layers.*.linear_qkv.bias", "m.layers.*.bias"),
    ]
    qkv, fc2, experts = convert_to_amax_map(weights, ".input_quantizer._amax")
    assert isinstance(qkv, AmaxFanoutMapping)
    assert qkv.megatron_param == "d.layers.*.linear_qkv.input_quantizer._amax"
    assert qkv.hf_targets == [f"m.layers.*.{p}_proj.input_quantizer._amax" for p in "qkv"]
    assert isinstance(fc2, AmaxMapping)
    assert fc2.hf_param == "m.layers.*.down_proj.input_quantizer._amax"
    assert isinstance(experts, MoeAmaxFanoutMapping)
    assert experts.megatron_param == "d.layers.*.experts.linear_fc1.input_quantizer._amax"
    assert experts.resolve(("5",)).hf_patterns == [
        "m.layers.5.experts.*.gate.input_quantizer._amax",
        "m.layers.5.experts.*.up.input_quantizer._amax",
    ]


def test_fan_out_takes_the_maximum_over_ranks_that_drifted_apart() -> None:
    mapping = AmaxFanoutMapping("d.*.q._amax", ["m.*.a._amax", "m.*.b._amax"]).resolve(("1",))

    def on_rank(ranks: ThreadRanks) -> dict[str, Tensor]:
        return mapping.on(ranks).megatron_to_hf(torch.tensor(1.0 + ranks.rank(Axis.TP)), None)

    for joined in run_threads(2, on_rank, {Axis.TP: [[0, 1]]}):
        assert {name: value.item() for name, value in joined.items()} == {"m.1.a._amax": 2.0, "m.1.b._amax": 2.0}


def test_import_takes_the_maximum_of_several_values() -> None:
    mapping = AmaxFanoutMapping("d.q._amax", ["a", "b", "c"])
    values = {"a": torch.tensor(1.0), "b": torch.tensor([3.0]), "c": torch.tensor(2.0)}
    assert mapping.hf_to_megatron(values, None).item() == 3.0


def test_a_dictionary_of_names_is_a_fan_out_too() -> None:
    mapping = AmaxMapping("d.*.q._amax", {"q": "m.*.q._amax", "k": "m.*.k._amax"}).resolve(("2",))
    assert set(mapping.megatron_to_hf(torch.tensor(4.0), None)) == {"m.2.q._amax", "m.2.k._amax"}


@given(size=st.sampled_from([1, 2, 4]), blocks=st.sampled_from([1, 3]))
def test_rows_of_amax_follow_rows_of_weights(size: int, blocks: int) -> None:
    """Per-channel `[out, 1]` and per-block `[out, blocks]`: what belongs to a row stays with it, q/k/v apart."""
    (amax,) = convert_to_amax_map([QKV])
    weight = torch.randn(16, 3 * blocks)
    rows = weight.abs().unflatten(1, (blocks, 3)).amax(-1)
    weights = QKV.join(weight.chunk(size), CONFIG)
    joined = amax.join(rows.chunk(size), CONFIG)
    for (name, part), found in zip(weights.items(), joined.values(), strict=True):
        assert torch.equal(part.abs().unflatten(1, (blocks, 3)).amax(-1), found), name
    for rank, shard in enumerate(rows.chunk(size)):
        assert torch.equal(amax.split(joined, CONFIG, rank, size), shard)


def test_a_row_parallel_weight_has_one_per_channel_amax_on_all_ranks() -> None:
    """Its columns are cut, so all ranks hold an amax of each row: the maximum counts."""
    (amax,) = convert_to_amax_map([RowParallelMapping("d.linear_fc2.weight", "m.down_proj.weight")])
    one, other = torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [4.0]])
    (joined,) = amax.join([one, other], None).values()
    assert joined.tolist() == [[2.0], [5.0]]
    assert amax.split({amax.targets[0]: joined}, None, 1, 2).tolist() == [[2.0], [5.0]]


def test_a_row_parallel_weight_has_per_block_amax_cut_with_its_columns() -> None:
    (amax,) = convert_to_amax_map([RowParallelMapping("d.linear_fc2.weight", "m.down_proj.weight")])
    shards = list(torch.arange(12.0).reshape(3, 4).chunk(2, dim=1))
    (joined,) = amax.join(shards, None).values()
    assert joined.tolist() == torch.arange(12.0).reshape(3, 4).tolist()


def test_per_channel_without_the_weight_mapping_is_refused() -> None:
    with pytest.raises(MappingError, match="convert_to_amax_map"):
        AmaxMapping("d.q._amax", "m.q._amax").join([torch.ones(4, 1)], None)


@given(experts=st.integers(1, 24), size=st.integers(1, 6))
def test_each_expert_gets_exactly_one_amax(experts: int, size: int) -> None:
    mapping = MoeAmaxFanoutMapping("d.experts.fc1.q._amax", ["m.experts.*.gate._amax", "m.experts.*.up._amax"], experts)
    shards = [torch.tensor(1.0 + rank) for rank in range(size)]
    if experts % size:
        with pytest.raises(MappingError, match=f"{experts} experts do not divide into {size}"):
            mapping.join(shards, None)
        return
    joined = mapping.join(shards, None)
    assert set(joined) == {f"m.experts.{e}.{p}._amax" for e in range(experts) for p in ("gate", "up")}
    for expert in range(experts):
        assert joined[f"m.experts.{expert}.gate._amax"].item() == 1.0 + expert * size // experts
    for rank in range(size):
        assert mapping.split(joined, None, rank, size).item() == 1.0 + rank


def test_moe_fan_out_through_expert_parallel_ranks() -> None:
    """EP=2 × ETP=2: the maximum over ETP, then a block of experts for each EP rank; and back."""
    mapping = MoeAmaxFanoutMapping("d.*.experts.fc2.q._amax", ["m.*.experts.*.down._amax"]).resolve(("0",))
    module = SimpleNamespace(config=SimpleNamespace(num_moe_experts=4))

    def on_rank(ranks: ThreadRanks) -> dict[str, Tensor]:
        amax = torch.tensor(10.0 * ranks.rank(Axis.EP) + ranks.rank(Axis.ETP))
        joined = mapping.on(ranks).megatron_to_hf(amax, module)
        assert mapping.on(ranks).hf_to_megatron(joined, module).item() == 10.0 * ranks.rank(Axis.EP) + 1
        return joined

    groups = {Axis.ETP: [[0, 1], [2, 3]], Axis.EP: [[0, 2], [1, 3]]}
    for joined in run_threads(4, on_rank, groups):
        assert [joined[f"m.0.experts.{e}.down._amax"].item() for e in range(4)] == [1.0, 1.0, 11.0, 11.0]


def test_the_number_of_experts_is_found_where_models_keep_it() -> None:
    mapping = MoeAmaxFanoutMapping("d.q._amax", ["m.experts.*.up._amax"])
    for name in ("num_moe_experts", "num_experts", "n_routed_experts"):
        assert len(mapping.megatron_to_hf(torch.tensor(1.0), SimpleNamespace(**{name: 3}))) == 3
    with pytest.raises(MappingError, match="unknown number of experts"):
        mapping.megatron_to_hf(torch.tensor(1.0), SimpleNamespace(config=SimpleNamespace()))


def test_bf16_amax_becomes_fp32_unchanged() -> None:
    value = torch.tensor(0.1, dtype=torch.bfloat16)
    (joined,) = AmaxMapping("a", "b").megatron_to_hf(value, None).values()
    assert joined.dtype == torch.float32
    assert joined == value.float()


def test_a_sharded_axis_of_one_is_no_maximum() -> None:
    (amax,) = convert_to_amax_map([ColumnParallelMapping("d.linear_fc1.weight", "m.up.weight")])
    (joined,) = amax.join([torch.ones(2, 1), 2 * torch.ones(2, 1)], None).values()
    assert joined.flatten().tolist() == [1, 1, 2, 2]


PRE_QUANT_SCALE = ".input_quantizer._pre_quant_scale"


def test_a_pre_quant_scale_is_cut_with_the_columns_of_a_row_parallel_weight() -> None:
    """One factor for each input channel: a rank that holds some columns of the weight holds their factors."""
    weight = RowParallelMapping("d.linear_fc2.weight", "m.down_proj.weight")
    (mapping,) = convert_to_amax_map([weight], PRE_QUANT_SCALE)
    assert mapping.targets == (f"m.down_proj{PRE_QUANT_SCALE}",)
    whole = {mapping.targets[0]: torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])}
    shards = [mapping.split(whole, None, rank, 3) for rank in range(3)]
    assert [shard.tolist() for shard in shards] == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert mapping.join(shards, None)[mapping.targets[0]].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    "weight",
    [
        ColumnParallelMapping("d.linear_q_proj.weight", "m.q_proj.weight"),
        DirectMapping("d.linear_q_down_proj.weight", "m.q_a_proj.weight"),
        GatedMLPMapping("d.linear_fc1.weight", "m.gate_proj.weight", "m.up_proj.weight"),
        QKVMapping("d.linear_qkv.weight", *(f"m.{part}_proj.weight" for part in "qkv")),
    ],
    ids=lambda weight: type(weight).__name__,
)
def test_a_pre_quant_scale_is_whole_on_every_rank_where_columns_are(weight: MegatronParamMapping) -> None:
    """Ranks that share the columns and differ are reduced with max, and every target gets the same vector."""
    (mapping,) = convert_to_amax_map([weight], PRE_QUANT_SCALE)
    joined = mapping.join([torch.tensor([1.0, 5.0, 3.0]), torch.tensor([2.0, 4.0, 3.0])], CONFIG)
    assert len(joined) == len(weight.targets)
    assert {tuple(vector.tolist()) for vector in joined.values()} == {(2.0, 5.0, 3.0)}
    for rank in range(2):
        assert mapping.split(joined, CONFIG, rank, 2).tolist() == [2.0, 5.0, 3.0]
