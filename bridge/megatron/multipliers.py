"""The constants of Granite that Megatron-Core lacks: factors for embeddings and for what layers add, divisor of logits.

They are attributes of the configuration that Megatron's has no fields for; None or absent for one.
"""

from functools import partial
from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def with_multipliers(model: LanguageModule) -> LanguageModule:
    """Puts hooks into the model that multiply, where its configuration says so."""
    config = model.config
    if (factor := getattr(config, "embedding_multiplier", None)) and model.pre_process:
        model.embedding.register_forward_hook(partial(_times, factor=factor))
    if factor := getattr(config, "residual_multiplier", None):
        for layer in model.decoder.layers:
            for part in (layer.self_attention, layer.mlp):
                part.register_forward_hook(partial(_each_times, factor=factor))
    if (divisor := getattr(config, "logits_scaling", None)) and model.post_process:
        model.output_layer.register_forward_hook(partial(_each_times, factor=1.0 / divisor))
    return model


def _times(module: Any, args: Any, output: Tensor, *, factor: float) -> Tensor:
    return output * factor


def _each_times(module: Any, args: Any, output: tuple[Tensor, Tensor | None], *, factor: float) -> tuple[Any, ...]:
    return tuple(part if part is None else part * factor for part in output)
