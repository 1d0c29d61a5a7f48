"""Llama 4's attention core: chunks, and queries scaled by their position, which Megatron-Core lacks.

Settings are attributes of the configuration that Megatron's has no fields for: `attention_chunk_size` (None for none),
`attn_temperature_tuning`, `floor_scale` and `attn_scale`. Source: transformers.models.llama4.modeling_llama4.
"""

import copy
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor


class ChunkedAttention(DotProductAttention):  # type: ignore[misc]  # Megatron is not typed
    """Attention of a layer with rotary embedding: a token sees those before it in its own chunk."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """`query` `[sequence, batch, heads/tp, head_dim]`; `attention_mask` is true where a token does not see."""
        if size := self.config.attention_chunk_size:
            chunks = torch.arange(len(query), device=query.device) // size
            attention_mask = attention_mask | (chunks[:, None] != chunks)
        attended: Tensor = super().forward(query, key, value, attention_mask, **kwargs)
        return attended


class ScaledQueryAttention(DotProductAttention):  # type: ignore[misc]
    """Attention of a layer without rotary embedding: queries grow with their position."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`query` `[sequence, batch, heads/tp, head_dim]`."""
        if self.config.attn_temperature_tuning:
            places = torch.arange(1, len(query) + 1, device=query.device, dtype=torch.float32)
            scales = torch.log1p(torch.floor(places / self.config.floor_scale)) * self.config.attn_scale + 1.0
            query = (query * scales[:, None, None, None]).to(query.dtype)
        attended: Tensor = super().forward(query, *args, **kwargs)
        return attended


def with_llama4_attention(layer: ModuleSpec, config: TransformerConfig, number: int) -> ModuleSpec:
    """The spec of a layer with its attention core; queries and keys are only normalized beside rotary embedding.

    Megatron normalizes before it rotates and the model after, which is the same for a norm without weight.
    """
    layer = copy.deepcopy(layer)
    attention = layer.submodules.self_attention.submodules
    rotates = not (config.no_rope_freq and config.no_rope_freq[number])
    attention.core_attention = ChunkedAttention if rotates else ScaledQueryAttention
    attention.q_layernorm = attention.k_layernorm = L2Norm if rotates and config.qk_l2_norm else IdentityOp
    return layer
