"""Tiny random models in Hugging Face's format."""

from pathlib import Path
from typing import Any

from tests.support.tiny_models import DELTA_NET, NEMOTRON_H, config, expert_biases, randomize


def make_qwen3(directory: Path, *, intermediate_size: int = 96) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "proj" in name:  # a largest element whose scale has an exact reciprocal, so that forwards can be compared
            parameter.data[0, 0] = 0.5
    model.bfloat16().save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')


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
    fields: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.08,
        "num_nextn_predict_layers": mtp_layers,
    }
    config = DeepseekV3Config(**{**fields, **sizes})
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


def make_nemotron_h(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import NemotronHForCausalLM

    torch.manual_seed(19)
    mtp = {"num_nextn_predict_layers": 2, "mtp_layers_block_type": ["full_attention", "moe"]}
    model = NemotronHForCausalLM(config("NemotronHForCausalLM", **NEMOTRON_H, **mtp)())
    randomize(model)
    model.bfloat16()
    expert_biases(model)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for layer, like in enumerate(("backbone.layers.2", "backbone.layers.3") * 2):  # transformers does not build them
        likes = {name.removeprefix(like): tensor for name, tensor in tensors.items() if name.startswith(f"{like}.")}
        if layer % 2 == 0:
            norm, projection = tensors["backbone.norm_f.weight"], torch.empty(64, 128, dtype=torch.bfloat16)
            likes |= {".enorm.weight": norm, ".hnorm.weight": norm, ".eh_proj.weight": projection}
        else:
            likes[".final_layernorm.weight"] = norm
        for name, tensor in likes.items():
            tensors[f"mtp.layers.{layer}{name}"] = (0.1 * torch.randn(tensor.shape)).to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def make_qwen3_next(directory: Path) -> None:
    """Two layers with experts, the second with attention, and an MTP layer, which transformers does not build."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3NextForCausalLM

    torch.manual_seed(23)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_nextn_predict_layers": 1}
    shared = {"shared_expert_intermediate_size": 64}
    model = Qwen3NextForCausalLM(config("Qwen3NextForCausalLM", **DELTA_NET, **sizes, **shared)())
    randomize(model)
    model.bfloat16().save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    norm = tensors["model.norm.weight"]
    likes = {"fc.weight": torch.empty(64, 128, dtype=torch.bfloat16), "norm.weight": norm}
    likes |= {"pre_fc_norm_embedding.weight": norm, "pre_fc_norm_hidden.weight": norm}
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    likes |= {name.replace("model.layers.1.", "layers.0."): tensor for name, tensor in last.items()}
    for name, like in likes.items():
        tensors[f"mtp.{name}"] = (0.1 * torch.randn(like.shape)).to(like.dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
