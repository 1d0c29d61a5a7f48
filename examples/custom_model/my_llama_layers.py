"""My Llama's layers in Megatron: what its training has, and an import builds."""

from typing import Any

from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor


class MyLlamaLayer(TransformerLayer):  # type: ignore[misc]  # Megatron is not typed
    """Megatron's layer with a norm after the MLP, before the residual is added."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.output_norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp.register_forward_hook(self._normalize)

    def _normalize(self, mlp: Any, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return self.output_norm(output[0]), output[1]


def with_output_norm(spec: ModuleSpec) -> ModuleSpec:
    """Megatron's spec of a decoder layer, as this layer."""
    spec.module = MyLlamaLayer
    return spec
