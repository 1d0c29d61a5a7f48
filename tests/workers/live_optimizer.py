"""Real ranks that take a step of Megatron's optimizers, and save their states in every sharding type.

    torchrun --nproc-per-node N live_optimizer.py HF_DIR OUT_DIR SIZES_JSON

`fully_reshardable`, `dp_reshardable` and `dp_zero_gather_scatter` are of a distributed optimizer, `whole` of one that
is not. They hold one model, whose NVFP4 quantizers have an amax made from their names; `plain` has no quantizers.
`live_none` and `live_nvfp4` are exports of an fp32 model that has the main parameters as its weights.
"""

import json
import queue
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.megatron.patches import Patch, patched
from tests.workers.live_moe import insert_quantizers, set_amax_from_names

_TENSOR, _TYPE = torch.tensor, torch.Tensor.type
TYPES = ("fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter")


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    with megatron.distributed(**sizes), patched(Patch(torch, "tensor", tensor), Patch(torch.Tensor, "type", type_of)):
        for distributed in (True, False):
            model = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            optimizer = stepped(model, distributed=distributed)
            if distributed:
                save(model, optimizer, out / "plain", "fully_reshardable")
            else:
                export_main_parameters(bridge, model, out)
            insert_quantizers(model)
            set_amax_from_names([model])
            for kind in TYPES if distributed else ("whole",):
                save(model, optimizer, out / kind, kind)


def export_main_parameters(bridge: AutoBridge, model: Any, out: Path) -> None:
    main = megatron.build_model(bridge.hf, dtype=torch.float32)
    for mine, other in zip(main.parameters(), model.parameters(), strict=True):
        mine.data.copy_(other.main_param)
    insert_quantizers(main)
    set_amax_from_names([main])
    for scheme in ("none", "nvfp4"):
        bridge.save_hf_pretrained(main, out / f"live_{scheme}", scheme=scheme, dtype="float32", max_shard_bytes=60_000)


def stepped(model: Any, *, distributed: bool) -> Any:
    """An optimizer that has taken one step: gradients are made from a seed, the same on all ranks."""
    how = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(model.config, how, model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
        clip_grad=0.0,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        each.prepare_grads()
        each.step_with_ready_grads()
    return optimizer


def save(model: Any, optimizer: Any, path: Path, kind: str) -> None:
    """As `save_checkpoint` of megatron.training.checkpointing."""
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    how = {"distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True, "dp_cp_group": group}
    state: dict[str, Any] = {"iteration": 7, "checkpoint_version": 3.0, "model": model.sharded_state_dict(metadata=how)}
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=how)
    iteration = path / "iter_0000007"
    iteration.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    with patched(Patch(filesystem_async, "_results_queue", queue.Queue())):
        dist_checkpointing.save(state, str(iteration))
    (path / "latest_checkpointed_iteration.txt").write_text("7")


def tensor(*values: Any, device: Any = None, **how: Any) -> torch.Tensor:
    """`torch.tensor` on the CPU, where the optimizer asks for CUDA."""
    del device
    return _TENSOR(*values, **how)


def type_of(self: torch.Tensor, *wanted: Any, **how: Any) -> Any:
    """`Tensor.type`, by which the optimizer tells bf16 from fp32 parameters, as if on a GPU."""
    return _TYPE(self, *wanted, **how) if wanted or how else _TYPE(self).replace("torch.", "torch.cuda.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
