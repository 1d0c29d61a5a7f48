"""Checkpoints of a given size for the benchmarks, dense or with packed experts, of random bf16 weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDTH, EXPERT_WIDTH, EXPERTS, VOCABULARY = 4096, 14336, 1536, 16, 8192
_BATCH = 64 << 20  # random numbers at a time


def write(directory: Path, kind: str, gigabytes: float, files: int = 2) -> Path:
    """Writes a checkpoint of about this size, cut into files between tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    limit = gigabytes * 1e9 / files
    parts: list[dict[str, Tensor]] = [{}]
    total, layers = 0, 0
    for name, tensor in _tensors(kind):
        if name.endswith("input_layernorm.weight"):
            if total >= gigabytes * 1e9:
                break
            layers += 1
        if sum(each.nbytes for each in parts[-1].values()) > limit:
            parts.append({})
        parts[-1][name] = tensor
        total += tensor.nbytes
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    architecture = "Qwen3ForCausalLM" if kind == "dense" else "Qwen3MoeForCausalLM"
    config = {"architectures": [architecture], "hidden_size": HIDDEN, "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _tensors(kind: str) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(_BATCH, generator=generator) * 0.02).bfloat16()

    def weight(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        start = int(torch.randint(_BATCH // 2, (), generator=generator))
        return noise.roll(start).repeat(-(-count // _BATCH))[:count].reshape(shape)

    yield "model.embed_tokens.weight", weight(VOCABULARY, HIDDEN)
    yield "lm_head.weight", weight(VOCABULARY, HIDDEN)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    layer = 0
    while True:
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name, rows in (("q_proj", HIDDEN), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", HIDDEN)):
            yield f"{prefix}.self_attn.{name}.weight", weight(rows, HIDDEN)
        yield f"{prefix}.post_attention_layernorm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
        if kind == "dense":
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}.mlp.{name}.weight", weight(WIDTH, HIDDEN)
            yield f"{prefix}.mlp.down_proj.weight", weight(HIDDEN, WIDTH)
        else:
            yield f"{prefix}.mlp.gate.weight", weight(EXPERTS, HIDDEN)
            yield f"{prefix}.mlp.experts.gate_up_proj", weight(EXPERTS, 2 * EXPERT_WIDTH, HIDDEN)
            yield f"{prefix}.mlp.experts.down_proj", weight(EXPERTS, HIDDEN, EXPERT_WIDTH)
        layer += 1
