"""The weight mappings: how Megatron fuses and shards, written as join and split.

Each handles tensors with any trailing dims (a weight `[out, in]`, a bias `[out]`, per-channel amax `[out, 1]`),
because only rows are interleaved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.mappings.mapping import MegatronParamMapping, hf_name
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.tensors import join_dim, shard_of


@dataclass(frozen=True)
class DirectMapping(MegatronParamMapping):
    """One to one, the same tensor on both sides, whole on every rank."""

    hf_param: str = hf_name()

    @property
    def roles(self) -> dict[str, str]:
        return {"": self.hf_param}

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {self.hf_param: join_dim(shards, self.shard_dim)}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        return shard_of(tensors[self.hf_param], self.shard_dim, rank, size)


@dataclass(frozen=True)
class ReplicatedMapping(DirectMapping):
    """One to one, replicated over the tensor-parallel ranks: norms, routers."""


@dataclass(frozen=True)
class RowOfMatrixMapping(DirectMapping):
    """One to one and replicated: a vector `[n]` in Megatron, a matrix `[1, n]` in Hugging Face's files."""

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {self.hf_param: shards[0][None]}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        row: Tensor
        (row,) = tensors[self.hf_param]
        return row


@dataclass(frozen=True)
class ColumnParallelMapping(DirectMapping):
    """One to one, output rows spread over the ranks: `[out/tp, in]`, biases `[out/tp]`."""

    @property
    def shard_dim(self) -> int:
        return 0


@dataclass(frozen=True)
class RowParallelMapping(DirectMapping):
    """One to one, input columns spread over the ranks: `[out, in/tp]`."""

    @property
    def shard_dim(self) -> int:
        return 1


@dataclass(frozen=True)
class SwappedHalvesMapping(ColumnParallelMapping):
    """As `ColumnParallelMapping`, for inputs that are two vectors side by side, in opposite order on both sides."""

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {self.hf_param: _swapped(join_dim(shards, 0))}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        return shard_of(_swapped(tensors[self.hf_param]), 0, rank, size)


def _swapped(matrix: Tensor) -> Tensor:
    """The right half of the columns before the left one; what has one value for a row stays as it is."""
    columns = matrix.shape[1] if matrix.ndim > 1 else 1
    return matrix if columns == 1 else matrix.roll(columns // 2, 1)


@dataclass(frozen=True)
class VocabParallelMapping(ColumnParallelMapping):
    """Embedding or output layer, rows spread over the ranks and padded at the end: `[padded_vocab/tp, hidden]`.

    Join drops the rows past `vocab_size`, split pads with zero rows up to `padded_vocab_size`. If these are
    unknown, nothing is padded.
    """

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        table = join_dim(shards, 0)
        rows = config.vocab_size or table.shape[0]
        if rows > table.shape[0]:
            raise ValueError(
                f"{table.shape[0]} rows are fewer than the vocabulary of {rows}. If this is the head of a reward model "
                "or another classifier, give architecture= and num_labels= (docs/reward-models.md)"
            )
        return {self.hf_param: table[:rows]}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        table = tensors[self.hf_param]
        padding = (config.padded_vocab_size or table.shape[0]) - table.shape[0]
        if padding:
            table = torch.cat([table, table.new_zeros(padding, *table.shape[1:])])
        return shard_of(table, 0, rank, size)


@dataclass(frozen=True)
class CopiedVocabMapping(VocabParallelMapping):
    """As `VocabParallelMapping`, for a tensor that the Hugging Face files hold several times.

    Args:
        copies: the other names. Join writes the tensor under every name, split reads `hf_param`.
    """

    copies: list[str] = hf_name(default_factory=list)

    @property
    def roles(self) -> dict[str, str]:
        return {"": self.hf_param, **{name: name for name in self.copies}}

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return dict.fromkeys(self.targets, super()._join(shards, config)[self.hf_param])


@dataclass(frozen=True)
class WholeOrRowsMapping(DirectMapping):
    """One to one; whole on every rank, or rows spread over the ranks. Join tells which by the rows of a shard.

    Split makes it whole.

    Args:
        rows: the fields of the configuration whose sum is the number of rows.
    """

    rows: tuple[str, ...] = ()

    @property
    def shard_dim(self) -> int:
        return 0

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        if len(shards) > 1:
            held, rows = len(shards[0]), sum(config.sizes(*self.rows))
            if held == rows:
                shards = shards[:1]
            elif held * len(shards) != rows:
                raise ValueError(f"{rows} rows are neither {held} nor {len(shards)} times {held}")
        return {self.hf_param: join_dim(shards, 0)}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        return tensors[self.hf_param]


@dataclass(frozen=True)
class HeadMapping(WholeOrRowsMapping):
    """A head in place of the output layer, with a row for each label: `[labels, hidden]`, its bias `[labels]`."""

    rows: tuple[str, ...] = ("num_labels",)

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        joined, labels = super()._join(shards, config), sum(config.sizes(*self.rows))
        if (found := len(joined[self.hf_param])) != labels:
            raise ValueError(f"the output layer has {found} rows, but config.json has {labels} labels")
        return joined


@dataclass(frozen=True)
class LatentDownMapping(WholeOrRowsMapping):
    """A down projection of multi-head latent attention: `[rank, in]`, or `[rank/tp, in]`.

    Transformer Engine's layers have it whole; Megatron-Core's own, by `transformer_impl`, spread its rows and gather
    their outputs. Layout: megatron.core.transformer.multi_latent_attention.MLASelfAttention.
    """

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        whole = super()._split(tensors, config, rank, size)
        return shard_of(whole, 0, rank, size) if config.transformer_impl == "local" else whole


_SHARD_DIMS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_q_proj.weight": 0,
    "linear_q_up_proj.weight": 0,
    "linear_kv_up_proj.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}


@dataclass(frozen=True)
class AutoMapping(DirectMapping):
    """One to one; the sharding follows from the Megatron name, as Megatron-Core's own layers shard it."""

    @property
    def shard_dim(self) -> int | None:
        name = self.megatron_param.rstrip("*0123456789")
        return next((dim for suffix, dim in _SHARD_DIMS.items() if name.endswith(suffix)), None)


@dataclass(frozen=True)
class QKVMapping(MegatronParamMapping):
    """Fused attention input: group after group, the query heads with their key and value head.

    Megatron: `[groups · (heads/groups + 2) · head_dim, …]`, each group `q q … k v`, rows spread over TP. With
    `attention_output_gate` a group is `q q … g g … k v`, and the Hugging Face q_proj holds each head's query rows
    and then its gate rows, `[heads · 2 · head_dim, …]`.
    Layout: megatron.core.transformer.attention.SelfAttention.get_query_key_value_tensors.
    """

    q: str = hf_name()
    k: str = hf_name()
    v: str = hf_name()

    @property
    def roles(self) -> dict[str, str]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def shard_dim(self) -> int:
        return 0

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        groups, heads, gates = _attention_layout(config)
        fused = join_dim(shards, 0)
        blocks = fused.unflatten(0, (groups, gates * heads + 2, -1))
        q, k, v = blocks.split([gates * heads, 1, 1], dim=1)
        if gates == 2:
            q = q.unflatten(1, (gates, heads)).transpose(1, 2)
        return {name: part.flatten(0, -fused.ndim) for name, part in zip(self.targets, (q, k, v), strict=True)}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        groups, heads, gates = _attention_layout(config)
        q, k, v = (tensors[name] for name in self.targets)
        q = q.unflatten(0, (groups, heads, gates, -1)).transpose(1, 2).flatten(1, 2)
        k, v = (part.unflatten(0, (groups, 1, -1)) for part in (k, v))
        return shard_of(torch.cat([q, k, v], dim=1).flatten(0, 2), 0, rank, size)


@dataclass(frozen=True)
class PackedQKVMapping(DirectMapping):
    """As `QKVMapping`, for a family whose files hold all query, then all key, then all value rows in one tensor."""

    @property
    def shard_dim(self) -> int:
        return 0

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {self.hf_param: torch.cat([*_QKV._join(shards, config).values()])}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        groups, heads, gates = _attention_layout(config)
        rows = tensors[self.hf_param].unflatten(0, (groups * (gates * heads + 2), -1))
        parts = rows.split([groups * gates * heads, groups, groups])
        return _QKV._split(dict(zip("qkv", (part.flatten(0, 1) for part in parts), strict=True)), config, rank, size)


_QKV = QKVMapping("", q="q", k="k", v="v")


def _attention_layout(config: ModelConfig) -> tuple[int, int, int]:
    """Query groups, query heads of a group, and 2 if each head has an output gate beside its query, else 1."""
    (heads,) = config.sizes("num_attention_heads")
    groups = config.num_query_groups or heads
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} query groups")
    return groups, heads // groups, 2 if config.attention_output_gate else 1


@dataclass(frozen=True)
class GatedMLPMapping(MegatronParamMapping):
    """Fused gate and up projection: each rank holds its gate rows, then its up rows, `[2 · ffn/tp, …]`."""

    gate: str = hf_name()
    up: str = hf_name()

    @property
    def roles(self) -> dict[str, str]:
        return {"gate": self.gate, "up": self.up}

    @property
    def shard_dim(self) -> int:
        return 0

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        halves = [shard.unflatten(0, (2, -1)) for shard in shards]
        return {name: join_dim([half[index] for half in halves], 0) for index, name in enumerate(self.targets)}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        return torch.cat([shard_of(tensors[name], 0, rank, size) for name in self.targets])


@dataclass(frozen=True)
class PackedGatedMLPMapping(DirectMapping):
    """As `GatedMLPMapping`, for a family whose files hold all gate rows and then all up rows in one tensor."""

    @property
    def shard_dim(self) -> int:
        return 0

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {self.hf_param: torch.cat([*_GATED._join(shards, config).values()])}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        gate, up = tensors[self.hf_param].unflatten(0, (2, -1))
        return _GATED._split({"gate": gate, "up": up}, config, rank, size)


_GATED = GatedMLPMapping("", gate="gate", up="up")
