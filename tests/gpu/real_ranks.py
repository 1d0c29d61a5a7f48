"""Megatron on two GPUs, exported from their memory over NCCL, gives the files that two CPUs give over gloo.

    python3 -m tests.gpu.real_ranks [--tiny] [--cpu]

A dense model at TP=2 and a mixture of experts at EP=2, both random, loaded from one Hugging Face directory, with amax
made from the quantizers' names: the same weights and amax in both runs. Prints what each rank moved, beside the naive
way, in which every rank receives every parameter (`benchmarks/traffic.py`); the export quantizes and writes as well.
Status 1 where a byte differs. `--cpu` rehearses: the first run is on CPUs too.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.support.paths import ROOT

WORKER = Path(__file__).with_name("rank_worker.py")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="models of a megabyte")
    parser.add_argument("--cpu", action="store_true", help="both runs on CPUs")
    parser.add_argument("--only", choices=["dense", "MoE"], help="one of the models")
    arguments = parser.parse_args()
    if not arguments.cpu and torch.cuda.device_count() < 2:
        sys.exit("needs two GPUs; --cpu rehearses without")
    failed = []
    print("| model | run | rank | shards | received | naive | export, s | naive, s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name, experts, sizes in (("dense, TP=2", 0, {"tp": 2}), ("MoE, EP=2", 16, {"tp": 1, "ep": 2})):
        if arguments.only not in (None, name.partition(",")[0]):
            continue
        with TemporaryDirectory() as directory:
            work = Path(directory)
            make_model(work / "hf", experts, tiny=arguments.tiny)
            for run, gpu in (("first", not arguments.cpu), ("cpu", False)):
                launch(work, run, sizes, gpu=gpu)
                print_figures(name, work / run)
            differing = differences(work / "first" / "nvfp4", work / "cpu" / "nvfp4")
            print(f"\n{name}: {differing or 'the same bytes'}\n", flush=True)
            failed += differing
    sys.exit(bool(failed))


def make_model(directory: Path, experts: int, *, tiny: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    hidden, layers = (64, 2) if tiny else (2048, 4)
    sizes: dict[str, Any] = {
        "vocab_size": 131 if tiny else 32_001,  # which two ranks must pad
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(7)
    if experts:
        moe = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2}
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **moe))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.bfloat16().save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')


def launch(work: Path, run: str, sizes: dict[str, int], *, gpu: bool) -> None:
    """Two ranks of the worker by torchrun; their output is shown when they fail."""
    out = work / run
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*command, WORKER, work / "hf", out, json.dumps(sizes)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{run} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")


def print_figures(name: str, out: Path) -> None:
    for rank in range(2):
        figures = json.loads((out / f"figures_{rank}.json").read_text())
        sizes = " | ".join(f"{figures[key] / MIB:.1f} MiB" for key in ("shards", "received", "naive_received"))
        times = " | ".join(f"{figures[key]:.2f}" for key in ("seconds", "naive_seconds"))
        print(f"| {name} | {figures['device']} | {rank} | {sizes} | {times} |", flush=True)


def differences(one: Path, other: Path) -> list[str]:
    """Names of files that are not the same in both directories."""
    names = sorted({path.name for directory in (one, other) for path in directory.iterdir()})
    paths = {name: (one / name, other / name) for name in names}
    return [
        name
        for name, (first, second) in paths.items()
        if not (first.exists() and second.exists() and first.read_bytes() == second.read_bytes())
    ]


if __name__ == "__main__":
    main()
