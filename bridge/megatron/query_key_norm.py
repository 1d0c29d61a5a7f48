"""Query and key norms that Megatron-Core lacks: over all heads, and after the rotary embedding."""

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn


class AllHeadsNorm(nn.Module):
    """RMS norm of queries or keys over all heads of a token; Megatron's own covers one head.

    `weight` `[heads · head_dim]` and its gradient are whole on every tensor-parallel rank.

    Args:
        field: name of the number of heads in the configuration.
        hidden_size: width of one head, as Megatron's attention passes it.
    """

    def __init__(self, *, field: str, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(getattr(config, field) * hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        """Normalizes `[sequence, batch, heads/tp, head_dim]`; the result has the same shape."""
        token: Tensor = gather_from_tensor_model_parallel_region(heads.flatten(-2))
        normed = nn.functional.rms_norm(token, self.weight.shape, self.weight, self.eps)
        shard: Tensor = scatter_to_tensor_model_parallel_region(normed)
        return shard.view_as(heads)


def with_norms_over_all_heads(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer, with these norms."""
    layer = copy.deepcopy(layer)
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = partial(AllHeadsNorm, field="num_attention_heads")
    attention.k_layernorm = partial(AllHeadsNorm, field="num_query_groups")
    return layer


class LateNorm(nn.Module):
    """RMS norm of each head, `weight` `[head_dim]`, that its attention applies after the rotary embedding."""

    def __init__(self, *, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        """Nothing yet: Megatron calls this before it rotates."""
        return heads

    def normalize(self, heads: Tensor) -> Tensor:
        """Normalizes `[sequence, batch, heads/tp, head_dim]`; the result has the same shape."""
        return nn.functional.rms_norm(heads, self.weight.shape, self.weight, self.eps)


class LateNormAttention(SelfAttention):  # type: ignore[misc]  # Megatron is not typed
    """Attention whose queries and keys are normalized where its core takes them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        norms = (self.q_layernorm, self.k_layernorm)
        self.core_attention.register_forward_pre_hook(partial(_normalize, norms=norms))


def _normalize(core: Any, args: tuple[Tensor, ...], *, norms: tuple[LateNorm, LateNorm]) -> tuple[Tensor, ...]:
    query, key, *rest = args
    return (norms[0].normalize(query), norms[1].normalize(key), *rest)


def with_norms_after_rotary(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer, with these norms."""
    layer = copy.deepcopy(layer)
    layer.submodules.self_attention.module = LateNormAttention
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = LateNorm
    return layer
