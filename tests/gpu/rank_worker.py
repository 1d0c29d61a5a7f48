"""One rank of `real_ranks.py`: a Megatron model with ModelOpt's NVFP4 quantizers, exported from where it lives.

    torchrun --nproc-per-node 2 rank_worker.py HF_DIR OUT_DIR SIZES_JSON

On GPUs with NCCL where there are some, else on CPUs with gloo. Notes what this rank moved, beside the naive way.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_parameters
from amaxbridge.bridge.live.process_ranks import current_ranks, world_rank
from benchmarks.traffic import CountingRanks, naive
from tests.workers.live_moe import insert_quantizers, set_amax_from_names


@dataclass(frozen=True)
class Figures:
    """Figures of one rank: bytes of its shards, and for both ways the seconds and the bytes received."""

    device: str
    shards: int
    seconds: float
    received: int
    naive_seconds: float
    naive_received: int


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    with megatron.distributed(**sizes):
        ranks = CountingRanks(current_ranks())
        bridge = AutoBridge.from_hf_pretrained(hf, ranks=ranks)
        model = megatron.build_model(bridge.hf, initialize=False)
        if torch.cuda.is_available():
            model.cuda()
        bridge.load_hf_weights(model)
        insert_quantizers(model)
        set_amax_from_names([model])
        parameters = {each.name: each.tensor for each in walk_parameters([model])}
        device = next(iter(parameters.values())).device
        bridge.save_hf_pretrained(model, out / "warm-up")  # loads and compiles
        ranks.received = 0
        taken = seconds(lambda: bridge.save_hf_pretrained(model, out / "nvfp4"))
        received, ranks.received = ranks.received, 0
        kind = "MoE" if model.config.num_moe_experts else "dense"
        config = SimpleNamespace(**vars(model.config), vocab_size=bridge.hf.config["vocab_size"])
        sized = SimpleNamespace(config=config)
        naive_taken = seconds(lambda: naive(ranks, sized, kind, parameters))
        shards = sum(tensor.nbytes for tensor in parameters.values())
        figures = Figures(str(device), shards, taken, received, naive_taken, ranks.received)
        (out / f"figures_{world_rank()}.json").write_text(json.dumps(asdict(figures)))


def seconds(work: Callable[[], Any]) -> float:
    """Seconds from the moment that all ranks begin until the last one ends."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
