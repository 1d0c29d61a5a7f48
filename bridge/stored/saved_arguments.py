"""The arguments that Megatron's training saves with every checkpoint as `args`: written, read and compared.

They are an untrusted pickle, which could run code, so they are read as data (`inert_pickle`).
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.stored.inert_pickle import Made, Named
from amaxbridge.bridge.stored.stored_source import StoredSource
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.megatron_settings import argument, differences, from_arguments, to_arguments, told

_SHAPES = (  # settings that decide the shapes of tensors, or what a mapping makes of their values
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "normalization",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mtp_num_layers",
    "linear_attention_freq",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_conv_kernel_dim",
    "dsa_indexer_n_heads",
    "dsa_indexer_head_dim",
    "dsa_indexer_topk_freq",
    "layernorm_zero_centered_gamma",
)
_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def megatron_arguments(hf: HFModel, config: Any, pattern: str | None = None) -> Namespace:
    """The arguments that Megatron's training reads from a checkpoint: the model and its parallel sizes.

    Args:
        config: Megatron's configuration of the model.
        pattern: the `hybrid_layer_pattern` of a HybridModel.
    """
    hybrid = {} if pattern is None else {"hybrid_layer_pattern": pattern, "num_layers": config.num_layers}
    parallel = {name: getattr(config, name) for name in _PARALLEL}
    return Namespace(**to_arguments({**hf.family.settings(hf.config), **hybrid}), **parallel)


def read_arguments(checkpoint: StoredSource) -> Mapping[str, Any] | None:
    """The saved arguments by name, None if the checkpoint has none.

    Raises:
        CheckpointError: they cannot be read.
    """
    return namespace(checkpoint.arguments())


def namespace(value: Any) -> Mapping[str, Any] | None:
    """The attributes of a pickled Namespace, None for any other value."""
    match value:
        case Made(by=Named("argparse", "Namespace"), state=dict() as attributes):
            return attributes
    return None


def saved_sizes(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The sizes of the model among saved arguments, as training names them."""
    settings = told(arguments)
    for name in (*_SHAPES, "padded_vocab_size"):
        if settings.get(name):
            yield argument(name), settings[name]


def disagreements(arguments: Mapping[str, Any], hf: HFModel) -> Iterator[str]:
    """One line for each size in which the saved arguments and config.json differ."""
    said, expected = told(arguments), hf.family.weight_settings(hf.config)
    if hf.family.hybrid_pattern is not None:
        expected["hybrid_layer_pattern"] = hf.family.layer_pattern(hf.config)
    try:
        found = hf.family.settings_of(from_arguments(arguments))
    except MappingError as error:
        yield str(error)
        return
    differ = differences(found, expected)
    for name in _SHAPES:
        if name in said and name in expected and name in differ:
            yield f"--{argument(name).replace('_', '-')} {found[name]}, but config.json gives {expected[name]}"
