"""The laws of the weight mappings: join ∘ split is the identity, whatever the topology."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amaxbridge.mappings import (
    AutoMapping,
    ColumnParallelMapping,
    DirectMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
    VocabParallelMapping,
)
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.gated_delta_net import (
    DeltaConvolutionMapping,
    DeltaProjectionMapping,
    InterleavedDeltaProjectionMapping,
    ZeroCentredNormMapping,
)
from amaxbridge.mappings.mamba_mixer import MambaConvolutionMapping, MambaProjectionMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.ranks import Axis, ThreadRanks, run_threads
from amaxbridge.mappings.weights import (
    HeadMapping,
    PackedGatedMLPMapping,
    PackedQKVMapping,
    RowOfMatrixMapping,
    SwappedHalvesMapping,
)

SIZES = st.sampled_from([1, 2, 4, 8])


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def round_trip(mapping: MegatronParamMapping, tensors: dict[str, Tensor], config: Any, size: int) -> list[Tensor]:
    """Splits a tensor into shards and joins them again, which must give the tensor."""
    shards = [mapping.split(tensors, config, rank, size) for rank in range(size)]
    joined = mapping.join(shards, config)
    assert list(joined) == list(mapping.targets)
    for name, tensor in tensors.items():
        assert torch.equal(joined[name], tensor), name
    return shards


@given(size=SIZES, rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_one_to_one(size: int, rows: int, columns: int) -> None:
    tensor = numbered(rows * size, columns * size)
    for kind, shape in (
        (DirectMapping, (rows * size, columns * size)),
        (ReplicatedMapping, (rows * size, columns * size)),
        (ColumnParallelMapping, (rows, columns * size)),
        (RowParallelMapping, (rows * size, columns)),
    ):
        shards = round_trip(kind("m.weight", "h.weight"), {"h.weight": tensor}, None, size)
        assert {tuple(shard.shape) for shard in shards} == {shape}
    vectors = round_trip(RowOfMatrixMapping("m.bias", "h.bias"), {"h.bias": tensor[:1]}, None, size)
    assert all(torch.equal(vector, tensor[0]) for vector in vectors)


@given(size=SIZES, rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_halves_of_columns_in_the_opposite_order(size: int, rows: int, columns: int) -> None:
    """Inputs side by side: MiMo has the hidden state first, Megatron the embedding."""
    mapping, whole = SwappedHalvesMapping("m.weight", "h.weight"), numbered(rows * size, 2 * columns)
    shards = round_trip(mapping, {"h.weight": whole}, None, size)
    first, second = numbered(2, columns)
    swapped = torch.cat(shards) @ torch.cat([second, first])
    assert torch.equal(swapped, whole @ torch.cat([first, second]))
    round_trip(mapping, {"h.weight": whole[:, :1]}, None, size)  # amax of rows
    assert torch.equal(mapping.split({"h.weight": whole[:, :1]}, None, 0, 1), whole[:, :1])


@given(size=SIZES, labels=st.integers(1, 3), sharded=st.booleans())
def test_heads_are_whole_or_have_their_rows_spread(size: int, labels: int, sharded: bool) -> None:
    labels *= size if sharded else 1
    mapping, config = HeadMapping("m.weight", "h.weight"), ModelConfig(num_labels=labels)
    whole = numbered(labels, 3)
    shards = whole.chunk(size) if sharded else [mapping.split({"h.weight": whole}, config, 0, size)] * size
    assert torch.equal(mapping.join(shards, config)["h.weight"], whole)
    with pytest.raises(MappingError, match=r"labels|neither"):
        mapping.join([numbered(labels + 1, 3)] * size, config)


@given(
    size=SIZES,
    groups=st.sampled_from([1, 2, 4, 8]),
    heads_per_group=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.integers(1, 3),
    trailing=st.sampled_from([(), (1,), (5,)]),
    gate=st.booleans(),
)
def test_qkv(
    size: int, groups: int, heads_per_group: int, head_dim: int, trailing: tuple[int, ...], gate: bool
) -> None:
    """Weights, biases (no trailing dim) and per-channel rows; also more ranks than key-value heads."""
    heads = groups * heads_per_group
    config = ModelConfig(num_attention_heads=heads, num_query_groups=groups, attention_output_gate=gate)
    rows = (heads * (1 + gate) + 2 * groups) * head_dim
    mapping = QKVMapping("m", "q", "k", "v")
    shapes = {"q": heads * (1 + gate) * head_dim, "k": groups * head_dim, "v": groups * head_dim}
    tensors = {name: numbered(count, *trailing) + 1000 * index for index, (name, count) in enumerate(shapes.items())}
    if rows % size == 0:
        shards = round_trip(mapping, tensors, config, size)
        packed = round_trip(PackedQKVMapping("m", "h"), {"h": torch.cat([*tensors.values()])}, config, size)
        assert all(map(torch.equal, packed, shards))
    else:
        with pytest.raises(MappingError, match=f"does not divide into {size} shards"):
            mapping.split(tensors, config, 0, size)


def test_qkv_interleaves_as_megatron_does() -> None:
    """Two groups of two heads, one row a head: q0 q1 k0 v0 | q2 q3 k1 v1."""
    config = ModelConfig(num_attention_heads=4, num_query_groups=2)
    joined = QKVMapping("m", "q", "k", "v").join([numbered(8)], config)
    assert {name: rows.tolist() for name, rows in joined.items()} == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}


def test_qkv_with_an_output_gate_keeps_each_heads_query_and_gate_together() -> None:
    """One group of two heads: q0 q1 g0 g1 k v in Megatron, q0 g0 q1 g1 in the Hugging Face q_proj."""
    config = ModelConfig(num_attention_heads=2, num_query_groups=1, attention_output_gate=True)
    joined = QKVMapping("m", "q", "k", "v").join([numbered(6)], config)
    assert {name: rows.tolist() for name, rows in joined.items()} == {"q": [0, 2, 1, 3], "k": [4], "v": [5]}


@given(size=SIZES, width=st.integers(1, 4), trailing=st.sampled_from([(), (3,)]))
def test_gated_mlp(size: int, width: int, trailing: tuple[int, ...]) -> None:
    gate = numbered(width * size, *trailing)
    shards = round_trip(GatedMLPMapping("m", "g", "u"), {"g": gate, "u": gate + 1000}, None, size)
    packed = round_trip(PackedGatedMLPMapping("m", "h"), {"h": torch.cat([gate, gate + 1000])}, None, size)
    assert all(map(torch.equal, packed, shards))
    for rank, shard in enumerate(shards):
        assert torch.equal(shard[:width], gate[rank * width : (rank + 1) * width]), "each rank: its gate, then its up"


@pytest.mark.parametrize(
    ("mapping", "rows", "message"),
    [
        (PackedQKVMapping("m", "h"), 9, r"h \[9\] do not make shard 0 of 1"),
        (PackedQKVMapping("m", "h"), 16, "do not make shard 0 of 3"),
        (RowOfMatrixMapping("m", "h"), 2, r"h \[2\] do not make shard 0 of 1"),
        (PackedGatedMLPMapping("m", "h"), 7, r"h \[7\] do not make shard 0 of 1"),
    ],
)
def test_packed_rows_that_do_not_divide(mapping: MegatronParamMapping, rows: int, message: str) -> None:
    config = ModelConfig(num_attention_heads=4, num_query_groups=2)
    with pytest.raises(MappingError, match=message):
        mapping.split({"h": numbered(rows)}, config, 0, 3 if rows == 16 else 1)


@given(
    size=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([4, 8]),
    heads_per_group=st.integers(1, 2),
    head_dim=st.integers(1, 3),
    state=st.integers(1, 3),
    trailing=st.sampled_from([(), (1,), (3,), (1, 4)]),
)
def test_mamba(
    size: int, groups: int, heads_per_group: int, head_dim: int, state: int, trailing: tuple[int, ...]
) -> None:
    """Weights, biases, per-channel rows and the convolution's three dims."""
    config = mamba_sizes(groups, groups * heads_per_group, head_dim, state)
    inner, states, heads = groups * heads_per_group * head_dim, groups * state, groups * heads_per_group
    round_trip(
        MambaProjectionMapping("m", "h"), {"h": numbered(2 * inner + 2 * states + heads, *trailing)}, config, size
    )
    round_trip(MambaConvolutionMapping("m", "h"), {"h": numbered(inner + 2 * states, *trailing)}, config, size)


def test_a_mamba_rank_has_its_share_of_each_piece() -> None:
    """Two heads of one row, two groups of one state: z0 x0 B0 C0 dt0 | z1 x1 B1 C1 dt1."""
    config = mamba_sizes(groups=2, heads=2, head_dim=1, state=1)
    projection = MambaProjectionMapping("m", "h")
    assert projection.split({"h": numbered(10)}, config, 1, 2).tolist() == [1, 3, 5, 7, 9]
    assert MambaConvolutionMapping("m", "h").split({"h": numbered(6)}, config, 0, 2).tolist() == [0, 2, 4]
    with pytest.raises(MappingError, match=r"m: 1 shard.*\[9\]"):
        projection.join([numbered(9)], config)


def mamba_sizes(groups: int, heads: int, head_dim: int, state: int) -> ModelConfig:
    return ModelConfig(mamba_num_groups=groups, mamba_num_heads=heads, mamba_head_dim=head_dim, mamba_state_dim=state)


@given(
    size=st.sampled_from([1, 2, 4]),
    key_heads=st.sampled_from([4, 8]),
    values_per_key=st.integers(1, 3),
    key_dim=st.integers(1, 3),
    value_dim=st.integers(1, 3),
    trailing=st.sampled_from([(), (1,), (3,), (1, 4)]),
)
def test_a_gated_delta_net(
    size: int, key_heads: int, values_per_key: int, key_dim: int, value_dim: int, trailing: tuple[int, ...]
) -> None:
    """Weights, per-channel rows and the convolution's three dims; both forms of Hugging Face."""
    heads = key_heads * values_per_key
    config = delta_sizes(key_heads, key_dim, heads, value_dim)
    keys, values = key_heads * key_dim, heads * value_dim
    rows = {"qkv": 2 * keys + values, "z": values, "b": heads, "a": heads}
    apart = {name: numbered(count, *trailing) + 1000 * index for index, (name, count) in enumerate(rows.items())}
    fused = {"qkvz": numbered(2 * keys + 2 * values, *trailing), "ba": numbered(2 * heads, *trailing) + 1000}
    of_parts = round_trip(DeltaProjectionMapping("m", *apart), apart, config, size)
    of_fused = round_trip(InterleavedDeltaProjectionMapping("m", *fused), fused, config, size)
    assert {len(shard) for shard in of_parts + of_fused} == {(2 * keys + 2 * values + 2 * heads) // size}
    round_trip(DeltaConvolutionMapping("m", "h"), {"h": numbered(2 * keys + values, *trailing)}, config, size)


def test_a_rank_has_its_share_of_each_section_of_a_gated_delta_net() -> None:
    """Two key heads with two value heads each, one row a head: q k v v z z b b a a of either."""
    config = delta_sizes(key_heads=2, key_dim=1, heads=4, value_dim=1)
    fused = {"qkvz": torch.tensor([10, 20, 30, 31, 40, 41, 11, 21, 32, 33, 42, 43]), "ba": torch.arange(50, 58)}
    mapping = InterleavedDeltaProjectionMapping("m", "qkvz", "ba")
    shards = [mapping.split(fused, config, rank, 2).tolist() for rank in (0, 1)]
    assert shards == [[10, 20, 30, 31, 40, 41, 50, 51, 52, 53], [11, 21, 32, 33, 42, 43, 54, 55, 56, 57]]
    apart = DeltaProjectionMapping("m", "qkv", "z", "b", "a").join([torch.tensor(shard) for shard in shards], config)
    assert {name: rows.tolist() for name, rows in apart.items()} == {
        "qkv": [10, 11, 20, 21, 30, 31, 32, 33],
        "z": [40, 41, 42, 43],
        "b": [50, 51, 54, 55],
        "a": [52, 53, 56, 57],
    }


def test_sections_that_do_not_divide_among_ranks_are_refused() -> None:
    config = delta_sizes(key_heads=2, key_dim=2, heads=2, value_dim=2)
    mapping = DeltaProjectionMapping("in_proj.weight", "qkv", "z", "b", "a")
    with pytest.raises(MappingError, match=r"in_proj\.weight: 4 shard.*, 2 rows do not divide into 4 shards"):
        mapping.join([numbered(5)] * 4, config)
    with pytest.raises(MappingError, match="do not divide among 3 key heads"):
        mapping.join([numbered(5)], delta_sizes(key_heads=3, key_dim=2, heads=4, value_dim=2))
    with pytest.raises(MappingError, match="does not say linear_num_key_heads"):
        mapping.join([numbered(5)], ModelConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_zero_centred_norm_is_one_less_in_megatron(size: int, dtype: torch.dtype) -> None:
    """Weights from a half on come back bit for bit; a weight's dtype never changes."""
    mapping, weight = ZeroCentredNormMapping("m", "h"), torch.linspace(0.5, 2.0, 97).to(dtype)
    for shard in round_trip(mapping, {"h": weight}, None, size):
        assert torch.equal(shard.double(), weight.double() - 1)
        assert shard.dtype == dtype


def delta_sizes(key_heads: int, key_dim: int, heads: int, value_dim: int) -> ModelConfig:
    return ModelConfig(
        linear_num_key_heads=key_heads,
        linear_key_head_dim=key_dim,
        linear_num_value_heads=heads,
        linear_value_head_dim=value_dim,
    )


@given(size=SIZES, vocab=st.integers(1, 40), padding=st.integers(0, 9))
def test_vocabulary_padding(size: int, vocab: int, padding: int) -> None:
    padded = vocab + padding + -(vocab + padding) % size
    config = ModelConfig(vocab_size=vocab, padded_vocab_size=padded)
    shards = round_trip(VocabParallelMapping("m", "h"), {"h": numbered(vocab, 2)}, config, size)
    assert sum(len(shard) for shard in shards) == padded


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("decoder.layers.*.self_attention.linear_proj.weight", 1),
        ("decoder.layers.*.mlp.experts.linear_fc2.weight*", 1),
        ("decoder.layers.*.mlp.linear_fc1.weight", 0),
        ("output_layer.weight", 0),
        ("decoder.layers.*.input_layernorm.weight", None),
        ("decoder.layers.*.mlp.router.weight", None),
    ],
)
def test_auto_knows_megatrons_own_layers(name: str, dim: int | None) -> None:
    assert AutoMapping(name, name.replace("decoder", "model")).shard_dim == dim


def test_experts_are_sharded_over_their_own_axis() -> None:
    assert ColumnParallelMapping("decoder.mlp.experts.linear_fc1.weight0", "h").axis == Axis.ETP
    assert ColumnParallelMapping("decoder.mlp.shared_experts.linear_fc1.weight", "h").axis == Axis.TP


def test_megatron_to_hf_and_back_through_ranks() -> None:
    """`megatron_to_hf` and `hf_to_megatron`, where each rank is a thread with its own shard."""
    config = ModelConfig(num_attention_heads=4, num_query_groups=2)
    module = SimpleNamespace(config=config)
    mapping = QKVMapping("l.*.w", "l.*.q", "l.*.k", "l.*.v").resolve(["3"])
    full = numbered(16, 3)

    def on_rank(ranks: ThreadRanks) -> dict[str, Tensor]:
        shard = full.chunk(2)[ranks.rank(Axis.TP)]
        bound = mapping.on(ranks)
        tensors = bound.megatron_to_hf(shard, module)
        assert torch.equal(bound.hf_to_megatron(tensors, module), shard)
        by_role = dict(zip("qkv", tensors.values(), strict=True))
        assert torch.equal(bound.hf_to_megatron(by_role, module), shard)
        return tensors

    first, second = run_threads(2, on_rank, {Axis.TP: [[0, 1]]})
    assert list(first) == ["l.3.q", "l.3.k", "l.3.v"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_misfit_names_parameter_shapes_axis_and_targets() -> None:
    config = ModelConfig(num_attention_heads=4, num_query_groups=2)
    with pytest.raises(MappingError, match=r"qkv\.weight: 1 shard.*tp.*\[7, 3\].*q, k, v"):
        QKVMapping("qkv.weight", "q", "k", "v").join([numbered(7, 3)], config)
    with pytest.raises(MappingError, match=r"w: h \[7, 3\] do not make shard 0 of 2 on tp"):
        ColumnParallelMapping("w", "h").split({"h": numbered(7, 3)}, None, 0, 2)
    with pytest.raises(MappingError, match="not given: u"):
        GatedMLPMapping("w", "g", "u").split({"g": numbered(2)}, None, 0, 1)


def test_wildcards_must_agree() -> None:
    with pytest.raises(MappingError, match="wildcards"):
        DirectMapping("a.*.weight", "b.weight")


def test_join_works_on_meta_tensors() -> None:
    """The plan infers shapes this way."""
    config = ModelConfig(num_attention_heads=4, num_query_groups=2)
    joined = QKVMapping("w", "q", "k", "v").join([torch.empty(8, 3, device="meta")] * 2, config)
    assert {name: tuple(tensor.shape) for name, tensor in joined.items()} == {"q": (8, 3), "k": (4, 3), "v": (4, 3)}


@pytest.mark.parametrize("size", [1, 2])
def test_a_table_with_fewer_rows_than_the_vocabulary_is_refused(size: int) -> None:
    """Rows past the vocabulary are padding; rows that are missing would be tokens without an embedding."""
    mapping = VocabParallelMapping("embedding.word_embeddings.weight", "embed.weight")
    shards = list(numbered(6, 2).chunk(size))
    with pytest.raises(MappingError, match="6 rows are fewer than the vocabulary of 7"):
        mapping.join(shards, SimpleNamespace(vocab_size=7, padded_vocab_size=8))
    assert len(mapping.join(shards, SimpleNamespace(vocab_size=6))["embed.weight"]) == 6


SHARDED_BY = {  # in Megatron-Core: a rank's ColumnParallelLinear has some rows of the weight, RowParallelLinear columns
    "embedding.word_embeddings.weight": "rows",
    "output_layer.weight": "rows",
    "decoder.layers.0.self_attention.linear_qkv.weight": "rows",
    "decoder.layers.0.self_attention.linear_qkv.bias": "rows",
    "decoder.layers.0.self_attention.linear_q_proj.weight": "rows",
    "decoder.layers.0.self_attention.linear_q_up_proj.weight": "rows",
    "decoder.layers.0.self_attention.linear_kv_up_proj.weight": "rows",
    "decoder.layers.0.self_attention.linear_proj.weight": "columns",
    "decoder.layers.0.self_attention.linear_proj.bias": None,
    "decoder.layers.0.self_attention.q_layernorm.weight": None,
    "decoder.layers.0.input_layernorm.weight": None,
    "decoder.layers.0.mlp.linear_fc1.weight": "rows",
    "decoder.layers.0.mlp.linear_fc1.bias": "rows",
    "decoder.layers.0.mlp.linear_fc2.weight": "columns",
    "decoder.layers.0.mlp.linear_fc2.bias": None,
    "decoder.layers.0.mlp.router.weight": None,
    "decoder.layers.0.mlp.router.expert_bias": None,
    "decoder.layers.0.mlp.experts.linear_fc1.weight17": "rows",
    "decoder.layers.0.mlp.experts.linear_fc2.weight17": "columns",
    "decoder.final_layernorm.weight": None,
}


@pytest.mark.parametrize(("name", "by"), SHARDED_BY.items())
def test_a_parameter_is_sharded_as_its_layer_in_megatron_is(name: str, by: str | None) -> None:
    mapping = AutoMapping(name, "h.weight")
    tensor = numbered(4, 6)
    expected = {"rows": tensor[2:], "columns": tensor[:, 3:], None: tensor}[by]
    assert torch.equal(mapping.split({"h.weight": tensor}, None, 1, 2), expected)
    round_trip(mapping, {"h.weight": tensor}, None, 2)
