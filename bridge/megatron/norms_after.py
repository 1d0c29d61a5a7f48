"""Norms of what attention and MLP compute, before it is added to the residual, which Megatron-Core lacks."""

import copy
from functools import partial
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class NormedOutputsLayer(TransformerLayer):  # type: ignore[misc]  # Megatron is not typed
    """A layer with `post_self_attn_layernorm` and `post_mlp_layernorm`, both `[hidden]`.

    Later releases of Megatron-LM and other training frameworks use these names. Hooks normalize, so that the forward
    pass stays Megatron's own.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_self_attn_layernorm = _norm(config)
        self.post_mlp_layernorm = _norm(config)
        self.self_attention.register_forward_hook(partial(_normalize, norm=self.post_self_attn_layernorm))
        self.mlp.register_forward_hook(partial(_normalize, norm=self.post_mlp_layernorm))


def _norm(config: TransformerConfig) -> nn.Module:
    norm: nn.Module = WrappedTorchNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
    return norm


def _normalize(module: Any, args: Any, output: tuple[Tensor, Tensor | None], *, norm: nn.Module) -> tuple[Tensor, None]:
    value, bias = output
    return norm(value if bias is None else value + bias), None


def with_norms_after(layer: ModuleSpec, *, also_before: bool) -> ModuleSpec:
    """The spec of a layer with these norms; without norms before attention and MLP unless `also_before`."""
    layer = copy.deepcopy(layer)
    layer.module = NormedOutputsLayer
    if not also_before:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    return layer
