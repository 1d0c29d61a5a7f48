"""The figures of docs/repair.md: a checkpoint whose experts' scales are unequal by up to ten times, and its repair.

    python -m tests.export.repair.unequal_experts DIRECTORY

Gate and up of each expert are random; the weights of up are smaller by a factor that differs from expert to expert,
between 1 and 10. A tool without fused groups quantizes each with a global scale of its own.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.repair import repair
from amaxbridge.export.verify import verify
from tests.support.checkpoints_to_verify import make
from tests.support.repair_breaks import share_nothing

LAYERS, EXPERTS, HIDDEN, FFN, HEADS = 4, 64, 1024, 512, 8
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN, "moe_intermediate_size": FFN, "num_experts": EXPERTS, "num_experts_per_tok": 8,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 128,
    "vocab_size": 512, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "max_position_embeddings": 1024,
}  # fmt: skip


def write_model(directory: Path) -> Path:
    """Weights as wide as those of a trained model: normal, and one in a thousand five times as large."""
    generator, factors = torch.Generator().manual_seed(0), random.Random(0)

    def weight(*shape: int, std: float = 0.02) -> Tensor:
        values = torch.randn(shape, generator=generator) * std
        return torch.where(torch.rand(shape, generator=generator) < 1e-3, 5 * values, values).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(512, HIDDEN), "lm_head.weight": weight(512, HIDDEN)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        for norm in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{norm}.weight"] = torch.ones(128).bfloat16()
        for name in "qkvo":
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = weight(HIDDEN, HIDDEN)
        tensors[f"{layer}.mlp.gate.weight"] = weight(EXPERTS, HIDDEN)
        for expert in (f"{layer}.mlp.experts.{number}" for number in range(EXPERTS)):
            tensors[f"{expert}.gate_proj.weight"] = weight(FFN, HIDDEN)
            tensors[f"{expert}.up_proj.weight"] = weight(FFN, HIDDEN, std=0.02 * 10 ** -factors.random())
            tensors[f"{expert}.down_proj.weight"] = weight(HIDDEN, FFN)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def main(root: Path) -> None:
    """Makes the checkpoints, and prints the figures."""
    hf = write_model(root / "hf")
    model_free_ptq(hf, root / "shared", "nvfp4a16", max_workers=2)
    made = make(hf, "nvfp4a16")
    share_nothing(made)
    made.write(root / "BAD", max_shard_bytes=100_000_000)
    [finding] = [each for each in verify(root / "BAD").findings if each.rule == "fused-weight-scales"]
    ratios = [float(str(problem).rpartition(" by up to ")[2]) for problem in finding.problems]
    groups = LAYERS * (EXPERTS + 1)
    print(f"{len(ratios)} of {groups} fused groups unequal; by {min(ratios):.3g} to {max(ratios):.3g} times")
    start = time.perf_counter()
    report = repair(root / "BAD", root / "GOOD")
    print(f"{time.perf_counter() - start:.1f} s, {sum(each.stat().st_size for each in root.glob('GOOD/*')):,} bytes")
    moved = [each.moved for each in report.changes if each.moved is not None]
    rms, most = [each.rms for each in moved], [each.largest for each in moved]
    print(f"{len(moved)} weights: RMS {statistics.mean(rms):.4f}, at most {max(rms):.4f}; one weight {max(most):.4f}")
    for name in ("BAD", "GOOD", "shared"):
        by_kind = {
            kind: [each.error for each in verify(root / name, reference=hf).errors if each.module.endswith(kind)]
            for kind in ("gate_proj", "up_proj", "k_proj")
        }
        print(name, {kind: f"{statistics.mean(of):.4f} {max(of):.4f}" for kind, of in by_kind.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
