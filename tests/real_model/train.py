"""The Megatron half: the model on tensor-parallel ranks, quantized, calibrated, trained on, exported and saved.

    torchrun --nproc-per-node 3 -m tests.real_model.train HF_DIR OUT_DIR

OUT_DIR gets

    live                the export of the model in memory
    checkpoint          Megatron's own
    training.json       the seconds of each stage, and the loss of each step
    losses_STAGE.pt     cross entropy of each held-back token, `[WINDOWS, CONTEXT]`

for the stages bf16, calibrated, trained and weights: the trained model with inputs left unquantized.

Losses are those of an fp32 forward. Its weights are bf16 numbers: those of the last two stages are fake-quantized in
bf16, as the weights of a checkpoint are dequantized.

QAT is distillation: the loss is the Kullback-Leibler divergence from the logits of the model before it was quantized.
So the perplexity of held-back text tells what quantization costs and how much of it training gives back, not that the
model got used to the training text.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from amaxbridge.bridge import AutoBridge  # noqa: E402
from amaxbridge.bridge.live.model_walk import walk_quantizers  # noqa: E402
from amaxbridge.bridge.live.process_ranks import world_rank, world_size  # noqa: E402
from amaxbridge.bridge.megatron import build_model, distributed, save_checkpoint  # noqa: E402
from amaxbridge.scripts.demo_training import (  # noqa: E402
    amax_values,
    forward_arguments,
    learning_rate_factor,
    quantize,
    require_equal_replicas,
    say,
    stage,
    token_losses,
)
from tests.real_model.text import CONTEXT, calibration_windows, held_back_windows, training_tokens  # noqa: E402

SEED = 1234
BATCH = 2  # of windows in a forward without gradients
STEPS, PEAK_LR = 16, 1e-4  # of one window each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with distributed(tp=world_size(), seed=SEED):
        results = run(options.hf, options.out)
    if world_rank() == 0:
        (options.out / "training.json").write_text(json.dumps(results, indent=1))


def run(hf: Path, out: Path) -> dict[str, Any]:
    bridge, seconds = AutoBridge.from_hf_pretrained(hf), dict[str, float]()
    held_back, tokens = held_back_windows(hf), training_tokens(hf)
    with stage(f"load the model at TP={world_size()}", seconds, "load"):
        teacher, model = (build_model(bridge.hf, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        bridge.load_hf_weights(teacher)
        bridge.load_hf_weights(model)
    with stage("losses in bf16", seconds, "bf16"):
        save_losses(teacher, held_back, out / "losses_bf16.pt")
    with stage("insert NVFP4 quantizers and calibrate them", seconds, "calibration"):
        quantize(model, calibration_windows(hf), BATCH)
        calibrated = amax_values(model)
    with stage("losses with quantizers", seconds, "calibrated"):
        save_losses(model.float(), held_back, out / "losses_calibrated.pt")
    with stage(f"distil for {STEPS} steps through the quantizers", seconds, "qat"):
        divergences = distil(model, teacher, tokens)
        model.bfloat16()
        if amax_values(model) != calibrated:
            raise RuntimeError("an amax changed after calibration; the checkpoint would not hold what training used")
    with stage("export the model in memory", seconds, "live"):
        bridge.save_hf_pretrained(model, out / "live", scheme="nvfp4")
    with stage("save the Megatron checkpoint", seconds, "checkpoint"):
        save_checkpoint(model, out / "checkpoint", iteration=STEPS)
    with stage("losses with quantizers, after the training", seconds, "trained"):
        mtq.fold_weight(model)
        save_losses(model.float(), held_back, out / "losses_trained.pt")
        for quantizer in walk_quantizers([model]):
            quantizer.module.disable()
        save_losses(model, held_back, out / "losses_weights.pt")
    return {"seconds": seconds, "divergences": divergences, "quantizers": len(calibrated)}


@torch.no_grad()
def save_losses(model: Any, windows: Tensor, path: Path) -> None:
    losses = torch.cat([token_losses(model.eval(), batch) for batch in windows.split(BATCH)])
    if world_rank() == 0:
        torch.save(losses, path)


def distil(model: Any, teacher: Any, tokens: Tensor) -> list[float]:
    """Trains in place towards the teacher's logits; returns the divergence of each step, in nats a token.

    All ranks draw the same windows and compute the same loss over the whole vocabulary.
    """
    model.train()
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    divergences = list[float]()
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * learning_rate_factor(step / STEPS)
        start = int(torch.randint(len(tokens) - CONTEXT, (), generator=generator))
        arguments = forward_arguments(tokens[None, start : start + CONTEXT + 1])
        with torch.no_grad():
            wanted = teacher(*arguments, runtime_gather_output=True).log_softmax(-1)
        found = model(*arguments, runtime_gather_output=True).log_softmax(-1)
        loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        divergences.append(loss.item())
        say(f"  step {step:2d}  divergence {loss.item():.3f}")
    require_equal_replicas(model)
    return divergences


if __name__ == "__main__":
    main()
