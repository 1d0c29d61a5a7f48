"""A family file for Llama-Nemotron Super and Ultra: Llamas whose layers differ, found by architecture search.

    amaxbridge export checkpoint=CKPT hf=HF_DIR output=OUT family=examples/llama_nemotron.py

`block_configs` of config.json says for each layer if it has attention, and an MLP, and how wide it is. Megatron reads
the same list (`--heterogeneous-layers-config-path`). Names are Llama's, and a layer has no names for what it lacks.
HF_DIR must have weights, whose names and shapes the checkpoint is held against: transformers has no class of the model.
`import` does not build it.
"""

from dataclasses import replace
from typing import Any

from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.llama import LLAMA
from amaxbridge.mappings.family import HFConfig, Translation, fixed, look_up


def _key_value_heads(hf_config: HFConfig) -> Any:
    """Key and value heads of a layer, the same in all that have attention: one size describes the model to mappings."""
    blocks = look_up(hf_config, "block_configs")
    linear = [
        f"layer {number}: {part}"
        for number, block in enumerate(blocks)
        for part in ("attention", "ffn")
        if block[part].get("replace_with_linear")
    ]
    if linear:
        raise UsageError(f"a linear layer stands for {', '.join(linear[:4])}: this file has no mappings of it")
    groups = {block["attention"]["n_heads_in_group"] for block in blocks if not block["attention"]["no_op"]}
    if len(groups) != 1:
        found = ", ".join(map(str, sorted(groups))) or "none"
        raise UsageError(f"n_heads_in_group must be the same in all layers with attention; found {found}")
    return look_up(hf_config, "num_attention_heads") // groups.pop()


def _only_exported(hf_config: HFConfig) -> None:
    raise UsageError("Llama-Nemotron is only exported: import does not build layers that differ")


FAMILY = replace(
    LLAMA,
    architectures=("DeciLMForCausalLM",),
    transformer={
        "num_layers": Translation(lambda hf_config: len(look_up(hf_config, "block_configs"))),
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": Translation(_key_value_heads),
        "kv_channels": Translation(decoder.head_dim),
        "layernorm_epsilon": "rms_norm_eps",
    },
    check=_only_exported,
    model={
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "position_embedding_type": fixed("rope"),
        "rotary_base": "rope_theta",
        "share_embeddings_and_output_weights": "tie_word_embeddings",
    },
)
