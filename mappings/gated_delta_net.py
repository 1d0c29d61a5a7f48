"""Gated delta net (arXiv 2412.06464): its fused projection and its convolution, whose sections are sharded one by one.

A rank has its share of every section, in order: `[query key value z beta alpha]` of its heads. query and key have
`key_head_dim` rows for each key head, value and z `value_head_dim` rows for each value head, beta and alpha one.
Layout: megatron.core.ssm.gated_delta_net.GatedDeltaNet.

Hugging Face has the sections in two forms:

    Qwen3-Next   in_proj_qkvz, in_proj_ba                           key head after key head, each with its value heads
    Qwen3.5      in_proj_qkv, in_proj_z, in_proj_b, in_proj_a       section after section
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.mappings.mapping import MegatronParamMapping, hf_name
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.tensors import join_sections, shard_of_sections
from amaxbridge.mappings.weights import ColumnParallelMapping, ReplicatedMapping


@dataclass(frozen=True)
class DeltaProjectionMapping(MegatronParamMapping):
    """`in_proj`: `[(2 · keys + 2 · values + 2 · value heads)/tp, …]`, as Qwen3.5 has it: section after section.

    qkv `[2 · keys + values, …]`, z `[values, …]`, b and a `[value heads, …]`.
    """

    qkv: str = hf_name()
    z: str = hf_name()
    b: str = hf_name()
    a: str = hf_name()

    @property
    def roles(self) -> dict[str, str]:
        return {"qkv": self.qkv, "z": self.z, "b": self.b, "a": self.a}

    @property
    def shard_dim(self) -> int:
        return 0

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        query, key, value, *rest = join_sections(shards, _projection_rows(config))
        return dict(zip(self.targets, [torch.cat([query, key, value]), *rest], strict=True))

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        qkv, *rest = (tensors[name] for name in self.targets)
        return shard_of_sections([*qkv.split(_projection_rows(config)[:3]), *rest], rank, size)


@dataclass(frozen=True)
class InterleavedDeltaProjectionMapping(MegatronParamMapping):
    """`in_proj` as Qwen3-Next has it: the query, key, values and z of a key head, then those of the next.

    qkvz `[2 · keys + 2 · values, …]`, ba `[2 · value heads, …]`.
    """

    qkvz: str = hf_name()
    ba: str = hf_name()

    @property
    def roles(self) -> dict[str, str]:
        return {"qkvz": self.qkvz, "ba": self.ba}

    @property
    def shard_dim(self) -> int:
        return 0

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        (heads,) = config.sizes("linear_num_key_heads")
        of_heads = [section.unflatten(0, (heads, -1)) for section in join_sections(shards, _projection_rows(config))]
        fused = torch.cat(of_heads[:4], dim=1), torch.cat(of_heads[4:], dim=1)
        return {name: each.flatten(0, 1) for name, each in zip(self.targets, fused, strict=True)}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        (heads,) = config.sizes("linear_num_key_heads")
        rows = [count // heads for count in _projection_rows(config)]
        qkvz, ba = (tensors[name].unflatten(0, (heads, -1)) for name in self.targets)
        sections = [*qkvz.split(rows[:4], dim=1), *ba.split(rows[4:], dim=1)]
        return shard_of_sections([section.flatten(0, 1) for section in sections], rank, size)


@dataclass(frozen=True)
class DeltaConvolutionMapping(ColumnParallelMapping):
    """`conv1d`: `[(2 · keys + values)/tp, 1, width]`, the sections query, key and value."""

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {self.hf_param: torch.cat(join_sections(shards, _projection_rows(config)[:3]))}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        return shard_of_sections(tensors[self.hf_param].split(_projection_rows(config)[:3]), rank, size)


@dataclass(frozen=True)
class ZeroCentredNormMapping(ReplicatedMapping):
    """A norm that multiplies by `1 + weight` in Megatron, and by its weight in Hugging Face.

    Megatron centres every norm of such a model at zero, that of the outputs of a gated delta net too; transformers all
    but this one. The sum is rounded once, to the tensor's dtype. From 0.5 to 256, a weight in 16 bits comes back from
    Megatron as it was; a smaller one is rounded to the precision that 1 has.
    """

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {name: 1 + weight for name, weight in super()._join(shards, config).items()}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        return super()._split(tensors, config, rank, size) - 1


def _projection_rows(config: ModelConfig) -> list[int]:
    """The rows of the sections query, key, value, z, beta and alpha."""
    key_heads, key_dim, heads, head_dim = config.sizes(
        "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim"
    )
    if heads % key_heads:
        raise ValueError(f"{heads} value heads do not divide among {key_heads} key heads")
    keys, values = key_heads * key_dim, heads * head_dim
    return [keys, keys, values, values, heads, heads]
