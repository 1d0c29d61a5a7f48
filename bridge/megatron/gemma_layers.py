"""Gemma 2 and 3 on Megatron-Core's own layers: the layers that Megatron-Core lacks.

Parameters have the names that NVIDIA's Megatron-Bridge gives them, so that both have the same mappings. The layers are
written for tests and small runs, without fused kernels. Some settings are attributes of the configuration that
Megatron's has no fields for: `attn_logit_softcapping`, `final_logit_softcapping` (None for none) and
`rotary_base_local` (absent in Gemma 2).
"""

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from amaxbridge.bridge.megatron.zero_centred_norms import ZeroCentredRMSNorm


class GemmaModel(GPTModel):  # type: ignore[misc]  # Megatron is not typed
    """A GPTModel of Gemma layers, with scaled embeddings and capped logits.

    Args:
        layers: a spec with as many layers; their content is replaced.
    """

    def __init__(self, config: TransformerConfig, layers: TransformerBlockSubmodules, **arguments: Any) -> None:
        gemma_layers = [_layer_spec(config)] * len(layers.layer_specs)
        super().__init__(config, TransformerBlockSubmodules(gemma_layers, ZeroCentredRMSNorm), **arguments)
        if self.pre_process:
            self.embedding.register_forward_hook(_scale)
        if self.post_process and config.final_logit_softcapping:
            self.output_layer.register_forward_hook(partial(_cap_output, cap=config.final_logit_softcapping))


class NormedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """A linear whose output is normalized. A hook normalizes, because ModelOpt recognizes a linear by its `forward`."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(input_size, output_size, config=config, **arguments)
        self.post_layernorm = ZeroCentredRMSNorm(config, output_size, config.layernorm_epsilon)
        self.register_forward_hook(_normalize)


class CappedDotProductAttention(DotProductAttention):  # type: ignore[misc]
    """Attention whose scores are capped before masking, if the model caps them."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.attn_logit_softcapping:
            self.scale_mask_softmax.register_forward_pre_hook(partial(_cap_input, cap=config.attn_logit_softcapping))


class LocalRotaryAttention(SelfAttention):  # type: ignore[misc]
    """Attention with a rotary base of its own in sliding-window layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, self.local_rotary = self.config, None
        base = getattr(config, "rotary_base_local", None)
        if base and is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number):
            self.local_rotary = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=1.0,
                rotary_base=base,
                use_cpu_initialization=config.use_cpu_initialization,
            )

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        if self.local_rotary is not None and rotary_pos_emb is not None:
            rotary_pos_emb = self.local_rotary(len(rotary_pos_emb))
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    qk_norm = ZeroCentredRMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ZeroCentredRMSNorm,
            self_attention=ModuleSpec(
                module=LocalRotaryAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CappedDotProductAttention,
                    linear_proj=NormedRowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ZeroCentredRMSNorm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=NormedRowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={  # Megatron's names for norms in checkpoints
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _scale(embedding: Any, args: Any, embedded: Tensor) -> Tensor:
    """Scales by the root of the hidden size, rounded to the embedding's dtype as in transformers."""
    return embedded * torch.tensor(embedded.shape[-1] ** 0.5, dtype=embedded.dtype)


def _normalize(linear: Any, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return linear.post_layernorm(output[0]), output[1]


def _cap_output(layer: Any, args: Any, output: tuple[Tensor, Any], *, cap: float) -> tuple[Tensor, Any]:
    return _capped(output[0], cap), output[1]


def _cap_input(softmax: Any, args: tuple[Tensor, Any, Any], *, cap: float) -> tuple[Tensor, Any, Any]:
    return (_capped(args[0], cap), *args[1:])


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)
