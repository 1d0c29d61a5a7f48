"""Real ranks of Megatron-FSDP that save a model as `--ckpt-format fsdp_dtensor` does, and as torch_dist.

    torchrun --nproc-per-node N live_fsdp.py HF_DIR OUT_DIR SIZES_JSON

`torch_dist` and `fsdp` hold one model, `quantized` the same with NVFP4 quantizers. Megatron-FSDP runs on the CPU: its
meshes are of that device type, and its streams do nothing, since collectives of gloo finish before they return.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.device_mesh import DeviceMesh

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.megatron.patches import Patch, patched
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from tests.workers.live_moe import insert_quantizers, set_amax_from_names


class Mesh:
    """Meshes of the CPU, where Megatron asks for CUDA's."""

    @staticmethod
    def from_group(group: Any, device_type: str, **how: Any) -> DeviceMesh:
        del device_type
        return DeviceMesh.from_group(group, "cpu", **how)


class Stream:
    """A stream on which nothing runs."""

    def wait_stream(self, other: Any) -> None:
        del other


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        arguments = megatron_arguments(bridge.hf, model.config)
        arguments.params_dtype = torch.bfloat16
        megatron.save_checkpoint(model, out / "torch_dist", iteration=7, arguments=arguments)
        save_fsdp(model, out / "fsdp", arguments)
        if sizes.get("ep", 1) == 1:
            quantized = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(quantized)
            insert_quantizers(quantized)
            set_amax_from_names([quantized])
            save_fsdp(quantized, out / "quantized", arguments)


def save_fsdp(model: Any, path: Path, arguments: Any) -> None:
    """As `save_checkpoint` and `preprocess_fsdp_dtensor_state_dict` of megatron.training.checkpointing."""
    how = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        use_distributed_optimizer=True,
        data_parallel_sharding_strategy="optim_grads_params",
    )
    with fsdp_on_cpu():
        wrapped = mcore_fsdp_adapter.FullyShardedDataParallel(model.config, how, model, device=torch.device("cpu"))
        state = wrapped.state_dict_for_save_checkpoint()
        handle_fp8_extra_state_case(state)
        state, _ = handle_swiglu_in_state_dict(wrapped, state, None)
        if model.config.num_moe_experts:
            state = handle_experts_in_state_dict(state, model.config.num_moe_experts)
        whole = {"args": arguments, "checkpoint_version": 3.0, "iteration": 7, "model": state}
        preprocess_state_dict_for_uneven_dtensor(whole)
        iteration = path / "iter_0000007"
        save(whole, storage_writer=FileSystemWriter(iteration))
        (path / "latest_checkpointed_iteration.txt").write_text("7")


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Inside, Megatron-FSDP wraps and saves a model on the CPU."""
    with patched(
        Patch(mcore_fsdp_adapter, "DeviceMesh", Mesh),
        Patch(torch.cuda, "current_device", lambda: 0),
        Patch(torch.cuda, "Stream", Stream),
        Patch(torch.cuda, "current_stream", Stream),
        Patch(torch.cuda, "get_rng_state", torch.get_rng_state),
        Patch(torch.cuda, "set_rng_state", lambda state: None),
    ):
        yield


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
