"""A refit that is planned once, beside an export that plans every time. `make bench-refit`.

    python benchmarks/refit.py [dense|moe] [--tp 2] [--layers 4] [--experts 64] [--hidden 256] [--ffn 128]

Real Megatron ranks in processes of their own (gloo, or NCCL where there is CUDA), a random model with ModelOpt's
quantizers. Timed are `export_hf_weights`, which plans, and `Refit.run`, both to the last tensor, and a delta refit
after one small step. All amax are alike, so that the tables of CPU kernels are made once: nearly all of the time is
overhead. `--scheme none` has no kernels at all.

On a GPU, the models of the table in `benchmarks/README.md`:

    python benchmarks/refit.py dense --tp 1 --layers 28 --hidden 2048 --ffn 6144
    python benchmarks/refit.py moe --tp 1 --layers 16 --experts 64 --hidden 2048 --ffn 896
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CALLS = 5


def config(arguments: argparse.Namespace) -> dict[str, Any]:
    """config.json of a Qwen3, dense or with experts."""
    moe = arguments.model == "moe"
    sizes = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.ffn,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": max(arguments.hidden // 128, 2),
        "num_key_value_heads": max(arguments.hidden // 512, 2),
        "head_dim": min(128, arguments.hidden // 2),
        "vocab_size": arguments.vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if moe:
        sizes |= {
            "num_experts": arguments.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": arguments.ffn,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return sizes


def build(hf: Path, scheme: str | None) -> tuple[Any, Any]:
    """The bridge, and the model with quantizers and amax."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    from amaxbridge.bridge import AutoBridge, megatron

    bridge = AutoBridge.from_hf_pretrained(hf)
    model = megatron.build_model(bridge.hf)
    if scheme == "nvfp4":
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG)
        for module in model.modules():
            if isinstance(module, TensorQuantizer) and module.is_enabled:
                module.amax = torch.tensor(1.0, device=next(model.parameters()).device)
    return bridge, model


def seconds(call: Callable[[], object], *, wall: bool) -> float:
    """The least time of some calls, after one that does not count: on a CPU that of the processor."""
    times = []
    for _ in range(CALLS + 1):
        _wait()
        begin = time.perf_counter() if wall else time.process_time()
        call()
        _wait()
        times.append((time.perf_counter() if wall else time.process_time()) - begin)
    return min(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def consume(tensors: Any) -> int:
    """Takes all tensors, and keeps none."""
    return sum(1 for _ in tensors)


def measure(rank: int, arguments: argparse.Namespace, directory: str, results: Any) -> None:
    """One rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.tp)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.port), "TORCHELASTIC_RUN_ID": "bench"}
    torch.set_num_threads(1)
    from amaxbridge.bridge import megatron
    from amaxbridge.bridge.live.refit import Refit
    from amaxbridge.export.delta.stream import Sender

    wall = torch.cuda.is_available()
    scheme = None if arguments.scheme == "none" else arguments.scheme
    with megatron.distributed(tp=arguments.tp):
        bridge, model = build(Path(directory), scheme)
        found = {"bf16_bytes": sum(each.nbytes for each in model.parameters())}
        found["planned_every_time"] = seconds(
            lambda: consume(bridge.export_hf_weights(model, scheme=scheme)), wall=wall
        )
        begin = time.perf_counter()
        refit = Refit(bridge, model, scheme=scheme)
        found["plan"] = time.perf_counter() - begin
        consume(refit.run())
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] if wall else 0
        found["tensors"] = consume(refit.run())
        if wall:
            after = torch.cuda.memory_stats()
            found["allocated_in_second_run"] = after["allocated_bytes.all.allocated"] - before
            found["segments"] = after["segment.all.allocated"]
        found["planned_once"] = seconds(lambda: consume(refit.run()), wall=wall)
        if wall:
            found["new_segments"] = torch.cuda.memory_stats()["segment.all.allocated"] - found["segments"]
        sender = Sender()
        consume(sender.step(refit.run()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * arguments.lr)
        begin = time.perf_counter()
        consume(sender.step(refit.run()))
        _wait()
        found["delta"] = time.perf_counter() - begin
        found["delta_bytes"], found["whole_bytes"] = sender.last.sent, sender.last.whole
    results.put((rank, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="moe", choices=("dense", "moe"))
    for name, default in (("tp", 2), ("layers", 4), ("experts", 64), ("hidden", 256), ("ffn", 128), ("vocab", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scheme", default="nvfp4", choices=("nvfp4", "nvfp4a16", "none"))
    parser.add_argument("--lr", type=float, default=1e-6, help="size of the step before the delta")
    parser.add_argument("--port", type=int, default=29_571)
    arguments = parser.parse_args()
    results = mp.get_context("spawn").SimpleQueue()
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config(arguments)))
        processes = mp.spawn(measure, (arguments, directory, results), nprocs=arguments.tp, join=False)
        found = dict(results.get() for _ in range(arguments.tp))
        processes.join()
    for rank in range(arguments.tp):
        print(f"rank {rank}:", json.dumps(found[rank]))
    each_time, once = (max(each[key] for each in found.values()) for key in ("planned_every_time", "planned_once"))
    print(f"planned every time {each_time:.4f} s, planned once {once:.4f} s: {each_time / once:.1f} times less")


if __name__ == "__main__":
    main()
