"""The training half of the demo: train, quantize and save a tiny model with real Megatron and ModelOpt, on CPUs.

    torchrun --nproc-per-node 2 scripts/demo_training.py HF_DIR CKPT_DIR RESULTS_JSON

Reads the architecture from HF_DIR/config.json and, on tensor-parallel ranks, trains it in fp32, rounds it to bf16, puts
ModelOpt's NVFP4 quantizers in, calibrates them, trains on through the quantizers (QAT) and saves Megatron's
distributed checkpoint under CKPT_DIR. RESULTS_JSON gets the loss curves, the held-back perplexity after every
stage and the seconds it took; beside it, logits_none.pt and logits_nvfp4.pt hold the model's logits on the first
held-back windows, to compare the exported models with.

Calibration runs on the bf16 model, so that every amax is a bf16 number. QAT runs in fp32 because a CPU multiplies bf16
ten times slower; converting to fp32 and back leaves every amax as it was. All perplexities but the untrained model's
are those of the bf16 model.
"""

# ruff: noqa: E402 - the path is set and warnings are silenced before the imports that need it
import argparse
import contextlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START = time.perf_counter()
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from amaxbridge.bridge.hf import HFModel, read_hf_model
from amaxbridge.bridge.live.model_walk import walk_quantizers
from amaxbridge.bridge.live.process_ranks import world_rank, world_size
from amaxbridge.bridge.megatron import build_model, distributed, save_checkpoint
from amaxbridge.scripts.demo_text import CONTEXT, held_back_windows, training_tokens

SEED = 1234
BATCH = 8
TRAINING_STEPS, TRAINING_LR = 700, 6e-3
QAT_STEPS, QAT_LR = 100, 3e-4
REPORT_EVERY = 50
CALIBRATION_WINDOWS = 32
LOGIT_WINDOWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("ckpt_dir", type=Path)
    parser.add_argument("results_json", type=Path)
    arguments = parser.parse_args()
    if arguments.ckpt_dir.exists() and any(arguments.ckpt_dir.iterdir()):
        parser.error(f"{arguments.ckpt_dir} is not empty; name another CKPT_DIR or remove it")

    hf = read_hf_model(arguments.hf_dir)
    with distributed(tp=world_size(), seed=SEED):
        results = run(hf, arguments.ckpt_dir, arguments.results_json.parent)
    if world_rank() == 0:
        arguments.results_json.write_text(json.dumps(results, indent=2) + "\n")


def run(hf: HFModel, ckpt_dir: Path, logits_dir: Path) -> dict[str, Any]:
    """Runs all stages and returns the content of RESULTS_JSON. The checkpoint holds the quantized model."""
    model = build_model(hf, dtype=torch.float32)
    tokens, held_back = training_tokens(), held_back_windows()
    seconds = {"imports": round(time.perf_counter() - START, 2)}
    perplexities: dict[str, float] = {"untrained": perplexity(model, held_back)}

    with stage(f"train {TRAINING_STEPS} steps in fp32, TP={world_size()}", seconds, "training"):
        loss = train(model, tokens, steps=TRAINING_STEPS, peak_lr=TRAINING_LR, seed=SEED)
    with stage("round to bf16", seconds, "bf16"):
        model.to(torch.bfloat16)
        perplexities["bf16"] = perplexity(model, held_back)
    with stage("put NVFP4 quantizers in and calibrate", seconds, "calibration"):
        quantize(model, tokens[: CALIBRATION_WINDOWS * (CONTEXT + 1)].view(CALIBRATION_WINDOWS, CONTEXT + 1))
        calibrated = amax_values(model)
        perplexities["nvfp4_ptq"] = perplexity(model, held_back)
    with stage(f"train {QAT_STEPS} steps through the quantizers", seconds, "qat"):
        qat_loss = train(model.float(), tokens, steps=QAT_STEPS, peak_lr=QAT_LR, seed=SEED + 1)
        model.to(torch.bfloat16)
        if amax_values(model) != calibrated:
            raise RuntimeError("an amax changed after calibration; the checkpoint would not hold what training used")
        perplexities["nvfp4_qat"] = perplexity(model, held_back)
    with stage("save the Megatron checkpoint", seconds, "checkpoint"):
        save_checkpoint(model, ckpt_dir, iteration=TRAINING_STEPS + QAT_STEPS)
    with stage("note the logits to compare with", seconds, "logits"):
        save_reference_logits(model, held_back, logits_dir)

    say("perplexity per byte: " + ", ".join(f"{name} {value:.3f}" for name, value in perplexities.items()))
    return {
        "perplexity": perplexities,
        "loss": {"training": loss, "qat": qat_loss},
        "seconds": seconds,
        "parallel": {"tp": world_size()},
        "counts": {
            "parameters": global_parameter_count(model),
            "quantizers": len(calibrated),
            "training_bytes": len(tokens),
            "bytes_seen": (TRAINING_STEPS + QAT_STEPS) * BATCH * CONTEXT,
            "held_back_bytes": held_back[:, 1:].numel(),
        },
    }


def train(model: GPTModel, tokens: torch.Tensor, *, steps: int, peak_lr: float, seed: int) -> list[tuple[int, float]]:
    """Train in place with Adam on random windows; return a few (step, mean loss since the previous one).

    All ranks draw the same windows, so the replicated parameters stay the same on all of them.
    """
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * learning_rate_factor(step / steps)
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        loss = token_losses(model, torch.stack([tokens[start : start + CONTEXT + 1] for start in starts])).mean()
        loss.backward()
        add_partial_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % REPORT_EVERY == 0:
            curve.append((step, sum(recent) / len(recent)))
            recent.clear()
            say(f"  step {step:4d}  loss {curve[-1][1]:.3f}")
    require_equal_replicas(model)
    return curve


def learning_rate_factor(progress: float) -> float:
    """Learning-rate factor: up for the first 5 % of the steps, then a cosine down to 0. `progress` is in (0, 1]."""
    return min(progress / 0.05, 0.5 + 0.5 * math.cos(math.pi * progress))


def token_losses(model: GPTModel, windows: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every token but the first of each window, `[windows, length - 1]`, fp32, over all vocab shards.

    Args:
        windows: token ids, `[windows, length]`.
    """
    losses: torch.Tensor = model(*forward_arguments(windows), labels=windows[:, 1:])
    return losses


def forward_arguments(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens of each window but the last, their positions, and a mask that is True where one must not attend."""
    inputs = windows[:, :-1]
    length = inputs.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return inputs, torch.arange(length).expand(len(windows), -1), mask


def add_partial_gradients(model: GPTModel) -> None:
    """Sum the q and k norms' gradients over the tensor-parallel ranks: each rank has those of its own heads only.

    The other replicated parameters have the whole gradient on every rank. Megatron does the same in
    `finalize_model_grads`, for models in its DDP wrapper.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in model.named_parameters():
        if "q_layernorm" in name or "k_layernorm" in name:
            dist.all_reduce(parameter.grad, group=group)


def require_equal_replicas(model: GPTModel) -> None:
    """Raise if a parameter that every tensor-parallel rank has in full differs between them."""
    replicas = torch.cat([p.detach().view(-1) for p in model.parameters() if not is_sharded(p)])
    highest, lowest = replicas.clone(), replicas.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    if not torch.equal(highest, lowest):
        raise RuntimeError(f"replicated parameters differ between ranks by {(highest - lowest).max().item()}")


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def global_parameter_count(model: GPTModel) -> int:
    return sum(p.numel() * (world_size() if is_sharded(p) else 1) for p in model.parameters())


@torch.no_grad()
def perplexity(model: GPTModel, windows: torch.Tensor) -> float:
    """exp of the mean cross entropy, so the effective number of choices for the next byte."""
    model.eval()
    losses = torch.cat([token_losses(model, batch) for batch in windows.split(BATCH)])
    return losses.double().mean().exp().item()


@torch.no_grad()
def save_reference_logits(model: GPTModel, windows: torch.Tensor, directory: Path) -> None:
    """Save the logits that the exported checkpoints must give: logits_none.pt and logits_nvfp4.pt.

    Both are of the weights in the checkpoint, `[LOGIT_WINDOWS, CONTEXT, vocab]`, with fp32 activations so that the
    order of sums hardly shows. Weights are bf16 numbers: the trained ones, then the fake-quantized ones. The model
    ends up in fp32, its weights quantized for good.
    """
    quantizers = [quantizer.module for quantizer in walk_quantizers([model])]
    for quantizer in quantizers:
        quantizer.disable()
    save_logits(model.float(), windows, directory / "logits_none.pt")
    for quantizer in quantizers:
        quantizer.enable()
    mtq.fold_weight(model.bfloat16())
    save_logits(model.float(), windows, directory / "logits_nvfp4.pt")


def save_logits(model: GPTModel, windows: torch.Tensor, path: Path) -> None:
    """Save the inputs and logits of the first windows over the whole vocabulary."""
    model.eval()
    arguments = forward_arguments(windows[:LOGIT_WINDOWS])
    logits = model(*arguments, runtime_gather_output=True)
    if world_rank() == 0:
        torch.save({"input_ids": arguments[0].clone(), "logits": logits}, path)


def quantize(model: GPTModel, windows: torch.Tensor, batch_size: int = BATCH) -> None:
    """Put NVFP4 quantizers on the weight and the input of every linear layer of the decoder, and calibrate them."""

    def calibrate(quantized: GPTModel) -> None:
        for batch in windows.split(batch_size):
            token_losses(quantized, batch)

    model.eval()
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # ModelOpt prints a summary on every rank
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)


def amax_values(model: GPTModel) -> dict[str, float]:
    """Every quantizer's amax, by buffer name."""
    return {name: buffer.item() for name, buffer in model.named_buffers() if name.endswith("_quantizer._amax")}


@contextlib.contextmanager
def stage(title: str, seconds: dict[str, float], name: str) -> Iterator[None]:
    """Print what is done, and record its seconds under `name`."""
    say(title)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def say(line: str) -> None:
    if world_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
