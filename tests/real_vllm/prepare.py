"""What real Megatron ranks export for vLLM to load: a dense and an MoE model in every scheme, and what must come out.

    python -m tests.real_vllm.prepare OUT_DIR

Runs in our environment. Sizes are the least that all formats and kernels can split over two ranks.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.launcher import Launcher
from tests.support.paths import WORKERS
from tests.support.tiny_models import config, randomize

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "dtype": "bfloat16",
}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "dense": ("Qwen3ForCausalLM", {}, {"tp": 2}),
    "moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
        {"tp": 1, "ep": 2},
    ),
}


def main(out: Path) -> None:
    (logs := out / "logs").mkdir(parents=True)
    launcher = Launcher(logs)
    try:
        for name, (architecture, sizes, mesh) in MODELS.items():
            save_model(architecture, sizes, out / name / "source")
            work = (WORKERS / "live_engine.py", out / name / "source", out / name)
            launcher(*work, json.dumps(mesh), processes=2)
            other = 3 - mesh["tp"]
            launcher(*work, json.dumps({"tp": other}), "logits", processes=other)
    finally:
        launcher.close()


def save_model(architecture: str, sizes: dict[str, Any], directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(23)
    model = AutoModelForCausalLM.from_config(config(architecture, **SIZES, **sizes)())
    randomize(model)
    model.bfloat16().save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
