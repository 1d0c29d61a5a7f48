"""Tiny random models in Hugging Face's format: the ones that several fixtures make in different sizes."""

from pathlib import Path
from typing import Any

from tests.support.tiny_models import expert_biases, randomize


def make_qwen3_moe(directory: Path, sizes: dict[str, Any]) -> Path:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(11)
    fields = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.08,
    }
    config = Qwen3MoeConfig(**{**fields, **sizes})
    model = Qwen3MoeForCausalLM(config)
    randomize(model)
    model.bfloat16().save_pretrained(directory)
    return directory


def make_deepseek_v3(directory: Path, mtp_layers: int, sizes: dict[str, Any]) -> Path:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(13)
    config = DeepseekV3Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.08,
        num_nextn_predict_layers=mtp_layers,
        **sizes,
    )
    model = DeepseekV3ForCausalLM(config)
    randomize(model)
    model.bfloat16()
    expert_biases(model)
    model.save_pretrained(directory)
    if mtp_layers:
        add_mtp_layers(directory, config.num_hidden_layers, mtp_layers)
    return directory


def add_mtp_layers(directory: Path, first: int, count: int) -> None:
    """Layers as DeepSeek stores them, which transformers neither loads nor saves: each like the last decoder layer."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    hidden = tensors["model.norm.weight"].numel()
    last = f"model.layers.{first - 1}."
    likes = {name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    likes |= {f"{name}.weight": tensors["model.norm.weight"] for name in ("enorm", "hnorm", "shared_head.norm")}
    likes["eh_proj.weight"] = torch.empty(hidden, 2 * hidden, dtype=torch.bfloat16)
    for layer in range(first, first + count):
        for name, like in likes.items():
            tensors[f"model.layers.{layer}.{name}"] = (0.1 * torch.randn(like.shape)).to(like.dtype)
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
