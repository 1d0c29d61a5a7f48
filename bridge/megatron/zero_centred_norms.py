"""RMSNorm times `1 + weight` in Megatron-Core's own layers, which have it through Transformer Engine only."""

from dataclasses import replace

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

_AROUND_MTP = ("enorm", "hnorm", "layer_norm")


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm times `1 + weight`, computed in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        normalized = nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (normalized * (1.0 + self.weight.float())).type_as(x)


def with_zero_centred_norms(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer of attention and MLP, with these norms."""
    attention = layer.submodules.self_attention
    norms = ("q_layernorm", "k_layernorm")
    held = [name for name in norms if getattr(attention.submodules, name, IdentityOp) is not IdentityOp]
    submodules = replace(
        layer.submodules,
        input_layernorm=ZeroCentredRMSNorm,
        pre_mlp_layernorm=ZeroCentredRMSNorm,
        self_attention=replace(
            attention, submodules=replace(attention.submodules, **dict.fromkeys(held, ZeroCentredRMSNorm))
        ),
    )
    return replace(layer, submodules=submodules)


def with_zero_centred_norms_around(block: MultiTokenPredictionBlockSubmodules) -> MultiTokenPredictionBlockSubmodules:
    """The spec of layers for multi-token prediction, with these norms around their decoder layers."""
    norms = dict.fromkeys(_AROUND_MTP, ZeroCentredRMSNorm)
    layers = [replace(layer, submodules=replace(layer.submodules, **norms)) for layer in block.layer_specs]
    return replace(block, layer_specs=layers)
