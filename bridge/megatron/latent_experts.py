"""The projections around latent experts, which Megatron-Core only builds from Transformer Engine's linears."""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_layer
from torch import Tensor, nn

from amaxbridge.bridge.megatron.patches import Patch, patched


class LatentLinear(nn.Linear):
    """A linear that every tensor-parallel rank holds whole, called as Megatron calls its own.

    A hook makes the output Megatron's, because ModelOpt recognizes a linear by its `forward`.
    """

    def __init__(
        self, inputs: int, outputs: int, *, config: TransformerConfig, init_method: Any, bias: bool, **rest: Any
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=config.params_dtype)
        if config.perform_initialization:
            init_method(self.weight)
        self.register_forward_hook(_with_no_bias)


def _with_no_bias(linear: nn.Module, args: Any, output: Tensor) -> tuple[Tensor, None]:
    return output, None


@contextlib.contextmanager
def latent_linears() -> Iterator[None]:
    """Inside, layers with latent experts are built with `LatentLinear`."""
    with patched(Patch(moe_layer, "HAVE_TE", True), Patch(moe_layer, "TELinear", LatentLinear)):
        yield
