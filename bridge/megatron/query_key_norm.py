"""The query and key norm over all heads, which Megatron-Core lacks."""

import copy
from functools import partial

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
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
