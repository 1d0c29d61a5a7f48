"""Megatron models of Transformer Engine's layers, as training scripts build them."""

import copy
from typing import Any

import torch
from cases import Case
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.megatron.mamba_in_torch import mixer_class

_ACTIVATIONS = {"silu": torch.nn.functional.silu, "relu2": squared_relu}


def build(hf: HFModel, case: Case) -> Any:
    """This rank's shards of the case's model, on its GPU; the weights are whatever Megatron initializes."""
    config = _config(hf, case)
    arguments = hf.family.model_arguments(hf.config)
    arguments["vocab_size"] += -arguments["vocab_size"] % case.tp
    if case.hybrid:
        arguments.pop("rope_scaling", None)
        arguments.pop("rope_scaling_factor", None)
        pattern = hf.family.layer_pattern(hf.config)
        layers = copy.deepcopy(hybrid_stack_spec)
        if "M" in pattern:
            layers.submodules.mamba_layer.submodules.mixer.module = mixer_class(config)
        model: Any = HybridModel(config, layers, hybrid_layer_pattern=pattern, **arguments)
    else:
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        model = GPTModel(config, layers, **arguments)
    if not case.fp8_parameters:  # which are what they have to be
        model.to(config.params_dtype)
    for module in model.modules():  # Megatron's router itself keeps its biases in fp32 whenever it runs
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias = module.expert_bias.float()
    return model


def _config(hf: HFModel, case: Case) -> TransformerConfig:
    fields = (hf.family.hybrid_config if case.hybrid else hf.family.transformer_config)(hf.config)
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    dtype = torch.float32 if case.fp32 else torch.bfloat16
    fp8 = {} if case.fp8 is None else {"fp8": "e4m3" if case.fp8 == "blockwise" else "hybrid", "fp8_recipe": case.fp8}
    experts = {}
    if fields.get("num_moe_experts"):
        experts = {"moe_grouped_gemm": case.grouped, "moe_token_dispatcher_type": "alltoall"}
    return kind(
        **fields,
        **fp8,
        **experts,
        fp8_param=case.fp8_parameters,
        transformer_impl="transformer_engine",
        attention_backend=AttnBackend.unfused,
        activation_func=_ACTIVATIONS[hf.family.activation],
        is_hybrid_model=case.hybrid,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=not case.fp32,
    )
