"""Mamba-2: the fused projection and the convolution of its mixer, whose sections are sharded one by one.

A rank has its share of every section, in order: `[z x B C dt]` of its heads and groups. z and x have `head_dim`
rows for each head, B and C `state` rows for each group, dt one for each head.
Layout: megatron.core.ssm.mamba_mixer.MambaMixer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.tensors import join_sections, shard_of_sections
from amaxbridge.mappings.weights import ColumnParallelMapping


@dataclass(frozen=True)
class MambaProjectionMapping(ColumnParallelMapping):
    """`in_proj`: `[(2 · heads · head_dim + 2 · groups · state + heads)/tp, …]`, the sections z, x, B, C and dt."""

    pieces: ClassVar[Sequence[str]] = ("z", "x", "B", "C", "dt")

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return {self.hf_param: torch.cat(join_sections(shards, self._rows(config)))}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        return shard_of_sections(tensors[self.hf_param].split(self._rows(config)), rank, size)

    def _rows(self, config: ModelConfig) -> list[int]:
        heads, head_dim, groups, state = config.sizes(
            "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"
        )
        inner, states = heads * head_dim, groups * state
        rows = {"z": inner, "x": inner, "B": states, "C": states, "dt": heads}
        return [rows[piece] for piece in self.pieces]


@dataclass(frozen=True)
class MambaConvolutionMapping(MambaProjectionMapping):
    """`conv1d`: `[(heads · head_dim + 2 · groups · state)/tp, 1, width]`, the sections x, B and C."""

    pieces: ClassVar[Sequence[str]] = ("x", "B", "C")
