"""One rank of a case with FP8 parameters: its live export is imported into a new model, whose training begins.

    python3 import_one.py OUT CASE        or under torchrun, where the case has several ranks

Transformer Engine keeps the random values that FP8 parameters begin with, in high precision, and Megatron's distributed
optimizer makes its main parameters of those. A step that moves nothing shows whether it knows of the import. Status 1
where a tensor is not the imported one, before the step or after it; of the delayed recipe after it, since Transformer
Engine quantizes with a scale of 1 until a step gives it one.
"""

import json
import sys
from pathlib import Path
from typing import Any

from cases import CASES, Case
from make_one import differing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from models import build
from training import positions, tokens_of_step

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank


def main(out: Path, name: str) -> None:
    case, directory = CASES[name], out / name
    expected = json.loads((directory / "expected.json").read_text())["tensors"]
    with megatron.distributed(tp=case.tp, ep=case.ep):
        bridge = AutoBridge.from_hf_pretrained(directory / "live")
        model = build(bridge.hf, case)
        bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, directory / "imported", scheme="none", overwrite=True)
        step_without_moving(model, case)
        bridge.save_hf_pretrained(model, directory / "stepped", scheme="none", overwrite=True)
        differ = {each: differing(directory / each, expected) for each in ("imported", "stepped")}
        if world_rank() == 0:
            print("; ".join(f"{each}: {len(names)} of {len(expected)} differ" for each, names in differ.items()))
    sys.exit(bool(differ["stepped"]) or (case.fp8 != "delayed" and bool(differ["imported"])))


def step_without_moving(model: Any, case: Case) -> None:
    """A step of Megatron's training at a learning rate of 0."""
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, fp8_param_gather=True)
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    config = OptimizerConfig(
        lr=0.0, weight_decay=0.0, bf16=True, use_distributed_optimizer=True, fp8_recipe=case.fp8, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    tokens, labels = tokens_of_step(0)
    wrapped.train()
    wrapped.zero_grad_buffer()
    wrapped(tokens, positions(tokens), None, labels=labels).mean().backward()
    finalize_model_grads([wrapped])
    optimizer.step()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
