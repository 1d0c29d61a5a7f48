"""Trains a tiny My Llama in Megatron, with ModelOpt's NVFP4 quantizers, and saves its checkpoint.

    python examples/custom_model/train.py HF_DIR CKPT
    torchrun --nproc-per-node 2 examples/custom_model/train.py HF_DIR CKPT

HF_DIR gets config.json, which describes the model. Its weights begin at random: there are none in HF_DIR.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments

FAMILY = Path(__file__).with_name("my_llama.py")
STEPS, TOKENS = 3, 16
CONFIG = {
    "architectures": ["MyLlamaForCausalLM"],
    "model_type": "my_llama",
    "dtype": "bfloat16",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


def main(hf: Path, checkpoint: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        hf.mkdir(parents=True, exist_ok=True)
        (hf / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with megatron.distributed(tp=ranks):
        torch.distributed.barrier()
        bridge = AutoBridge.from_hf_pretrained(hf, family=FAMILY)
        model = megatron.build_model(bridge.hf, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            loss = next_token_loss(model, seed=step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {loss.item():.3f}")
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: next_token_loss(model, seed=STEPS))
        model.bfloat16()
        arguments = megatron_arguments(bridge.hf, model.config)
        megatron.save_checkpoint(model, checkpoint, iteration=STEPS, arguments=arguments)


def next_token_loss(model: Any, *, seed: int) -> torch.Tensor:
    tokens = torch.randint(0, CONFIG["vocab_size"], (4, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(TOKENS)[None].expand(4, -1)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)[None, None]
    loss: torch.Tensor = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return loss.mean()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
