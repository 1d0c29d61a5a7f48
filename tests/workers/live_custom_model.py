"""Megatron's logits for a model of a family file, and what is said of it as a HybridModel.

torchrun --nproc-per-node N live_custom_model.py HF_DIR FAMILY_FILE OUT
"""

import os
import sys
from pathlib import Path

import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.mappings.errors import UsageError
from tests.workers.model import calibrate


def main(hf: Path, family: Path, out: Path) -> None:
    with megatron.distributed(tp=int(os.environ.get("WORLD_SIZE", "1"))):
        bridge = AutoBridge.from_hf_pretrained(hf, family=family)
        model = megatron.build_model(bridge.hf, dtype=torch.float32)
        bridge.load_hf_weights(model)
        logits = calibrate(model)
        try:
            megatron.build_model(bridge.hf, model_class="hybrid")
        except UsageError as error:
            refused = str(error)
        if world_rank() == 0:
            torch.save({"logits": logits, "refused": refused}, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
