"""Building a Megatron model of a Hugging Face configuration."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.megatron.classifier_head import with_classifier_head
from amaxbridge.bridge.megatron.gated_delta_layers import with_gated_delta_net
from amaxbridge.bridge.megatron.gemma_layers import GemmaModel
from amaxbridge.bridge.megatron.hybrid_model import build_hybrid_chunk
from amaxbridge.bridge.megatron.latent_experts import latent_linears
from amaxbridge.bridge.megatron.llama4_attention import with_llama4_attention
from amaxbridge.bridge.megatron.multipliers import with_multipliers
from amaxbridge.bridge.megatron.norms_after import with_norms_after
from amaxbridge.bridge.megatron.query_key_norm import with_norms_after_rotary, with_norms_over_all_heads
from amaxbridge.bridge.megatron.without_cuda import TRANSFORMER_CONFIG_FOR_CPU
from amaxbridge.bridge.megatron.zero_centred_norms import (
    ZeroCentredRMSNorm,
    with_zero_centred_norms,
    with_zero_centred_norms_around,
)
from amaxbridge.mappings.errors import AmaxbridgeError, UsageError

type ModelClass = Literal["gpt", "hybrid"]

_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu2": squared_relu,
}
_MODELS = {"gpt": GPTModel, "gemma": GemmaModel}


def build_model(
    hf: HFModel,
    *,
    dtype: torch.dtype = torch.bfloat16,
    initialize: bool = True,
    model_class: ModelClass | None = None,
) -> LanguageModule:
    """A new Megatron model of a Hugging Face configuration: this rank's shards.

    Uses Megatron-Core's own layers (no Transformer Engine), so that it runs wherever torch does. For the same reason,
    each expert is a module (SequentialMLP), and tokens travel by all-gather.

    Args:
        initialize: give the weights random values; otherwise they are uninitialized memory.
        model_class: GPTModel or HybridModel; None for GPTModel if the family has one.

    Raises:
        UsageError: Megatron does not have the model in this class, or refuses its sizes.
    """
    (model,) = build_chunks(hf, dtype=dtype, initialize=initialize, model_class=model_class)
    return model


def build_chunks(
    hf: HFModel,
    *,
    dtype: torch.dtype = torch.bfloat16,
    initialize: bool = True,
    model_class: ModelClass | None = None,
) -> list[LanguageModule]:
    """As `build_model`: this rank's chunks in the order of the virtual pipeline; one chunk without it."""
    only_hybrid = hf.family.hybrid_pattern is not None
    if model_class == "gpt" and only_hybrid:
        raise UsageError(f"{', '.join(hf.family.architectures)} is a HybridModel in Megatron, not a GPTModel")
    if model_class == "hybrid" and (hf.family.model_class != "gpt" or hf.family.layer is not None):
        raise UsageError(f"{', '.join(hf.family.architectures)} cannot be built as a HybridModel")
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    hybrid = only_hybrid or model_class == "hybrid"
    build = _build_hybrid_chunk if hybrid else _build_chunk
    stages = [None] if chunks is None else range(chunks)
    with _judged_by_megatron(hf), latent_linears():
        config = _transformer_config(hf, dtype, initialize=initialize, hybrid=hybrid)
        chunks = [with_classifier_head(build(hf, config, vp_stage), hf) for vp_stage in stages]
        return [_keep_biases(chunk.to(dtype)) for chunk in chunks]


@contextmanager
def _judged_by_megatron(hf: HFModel) -> Iterator[None]:
    """Turns whatever Megatron raises on sizes that it does not build into a UsageError."""
    try:
        yield
    except AmaxbridgeError:
        raise
    except Exception as error:
        why = str(error) or type(error).__name__
        raise UsageError(f"Megatron does not build the model of {hf.source}: {why}") from error


def _keep_biases(chunk: LanguageModule) -> LanguageModule:
    """Converts router biases of experts to fp32, as Megatron's router itself does whenever it runs."""
    for module in chunk.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias = module.expert_bias.float()
    return chunk


class LatentDotProductAttention(DotProductAttention):  # type: ignore[misc]  # Megatron is not typed
    """Megatron-Core's own attention for latent attention, where values and keys differ in width."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


class DirectQueryAttention(MLASelfAttention):  # type: ignore[misc]  # Megatron is not typed
    """Latent attention with uncompressed queries: the layers of the spec, without the norm of queries.

    Megatron 0.19.2 only supports this with a fused norm before the query projection, which no Hugging Face model has,
    or without the norm of latent keys and values, which all have.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "kv_layernorm")
        return {"q_layernorm": IdentityOp, **{name: getattr(submodules, name) for name in names}}


def _transformer_config(hf: HFModel, dtype: torch.dtype, *, initialize: bool, hybrid: bool) -> TransformerConfig:
    fields = (hf.family.hybrid_config if hybrid else hf.family.transformer_config)(hf.config)
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    config = kind(
        **fields,
        transformer_impl="local",
        perform_initialization=initialize,
        activation_func=_ACTIVATIONS[hf.family.activation],
        is_hybrid_model=hybrid,
        init_method_std=hf.config.get("initializer_range", 0.02),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        moe_token_dispatcher_type="allgather",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        **({} if torch.cuda.is_available() else TRANSFORMER_CONFIG_FOR_CPU),
    )
    for name, value in hf.family.layer_settings(hf.config).items():
        setattr(config, name, value)
    return config


def _build_chunk(hf: HFModel, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    arguments = hf.family.model_arguments(hf.config)
    arguments["vocab_size"] += -arguments["vocab_size"] % config.tensor_model_parallel_size
    layers = _decoder_spec(hf, config, vp_stage)
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False, vp_stage=vp_stage)
        if mtp is not None and config.layernorm_zero_centered_gamma:
            mtp = with_zero_centred_norms_around(mtp)
    model = _MODELS[hf.family.model_class](
        config,
        layers,
        mtp_block_spec=mtp,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        **arguments,
    )
    return with_multipliers(model)


def _decoder_spec(hf: HFModel, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The spec of this chunk's decoder layers, with the attention and norms that Megatron's local specs lack."""
    known = copy.copy(config)
    known.experimental_attention_variant = None  # of which Megatron has specs for Transformer Engine only
    block = get_gpt_decoder_block_spec(
        known, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    block.layer_specs = [
        _adapted(layer, hf, config, number) for number, layer in enumerate(block.layer_specs, start=first)
    ]
    if config.experimental_attention_variant == "gated_delta_net":
        linear = config.linear_attention_freq[first:]
        block.layer_specs = [
            with_gated_delta_net(layer) if delta else layer
            for layer, delta in zip(block.layer_specs, linear, strict=False)
        ]
    if config.layernorm_zero_centered_gamma:
        block.layer_norm = ZeroCentredRMSNorm
    return block


def _build_hybrid_chunk(hf: HFModel, config: TransformerConfig, vp_stage: int | None) -> HybridModel:
    dense, sparse = (
        get_gpt_layer_local_spec(
            num_experts=experts,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        )
        for experts in (None, config.num_moe_experts)
    )
    dense = _adapted(dense, hf, config)
    if config.layernorm_zero_centered_gamma:
        sparse = with_zero_centred_norms(sparse)
    return build_hybrid_chunk(hf, config, vp_stage, dense=dense, sparse=sparse)


def _adapted(layer: ModuleSpec, hf: HFModel, config: TransformerConfig, number: int = 0) -> ModuleSpec:
    """Megatron's local spec of a layer, with the attention and norms that the spec lacks.

    Args:
        number: of the layer in the decoder, from 0; of interest if its layers differ.
    """
    if config.multi_latent_attention:
        layer = _with_latent_attention(layer, config)
    if config.layernorm_zero_centered_gamma:
        layer = with_zero_centred_norms(layer)
    if hf.family.norm_over_all_heads:
        layer = with_norms_over_all_heads(layer)
    if hf.family.norm_after_rotary:
        layer = with_norms_after_rotary(layer)
    if hasattr(config, "attn_temperature_tuning"):
        layer = with_llama4_attention(layer, config, number)
    if hf.family.has_in_layers("post_mlp_layernorm"):
        layer = with_norms_after(layer, also_before=hf.family.has_in_layers("input_layernorm"))
    return layer if hf.family.layer is None else hf.family.layer(copy.deepcopy(layer), config)


def _with_latent_attention(layer: ModuleSpec, config: MLATransformerConfig) -> ModuleSpec:
    """Corrects Megatron's local spec: the attention core, and the norm of compressed queries if there are none."""
    layer = copy.deepcopy(layer)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = LatentDotProductAttention
    if config.q_lora_rank is None:
        layer.submodules.self_attention.module = DirectQueryAttention
    return layer
