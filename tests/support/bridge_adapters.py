"""Adapters on a live Megatron model, of megatron-core's own parallel linears, as Megatron-Bridge builds and saves them.

Megatron-Bridge needs Transformer Engine, and so a GPU. These modules follow its structure, names, shards and sharded
state: an adapter wraps a linear as `to_wrap`; A is column-parallel over the rank, or row-parallel over the inputs; B is
column-parallel; B of a gated fc1 is saved as gate, then up, also B of a half alone; DoRA's lengths in rank order.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn


class Adapter(nn.Module):
    """A and B of one linear; with `lengths` DoRA's, too."""

    def __init__(self, name: str, base: Any, *, rank: int, alpha: float, rows: int, dora: bool, expert: bool) -> None:
        super().__init__()
        self.name, self.config, self.dim, self.alpha = name, base.config, rank, alpha
        self.input_is_parallel = isinstance(base, RowParallelLinear)
        how = {"config": base.config, "bias": False, "init_method": nn.init.zeros_, "is_expert": expert}
        if self.input_is_parallel:
            self.linear_in: Any = RowParallelLinear(
                base.input_size, rank, input_is_parallel=True, skip_bias_add=True, **how
            )
        else:
            self.linear_in = ColumnParallelLinear(base.input_size, rank, gather_output=True, **how)
        self.linear_out = ColumnParallelLinear(rank, rows, gather_output=self.input_is_parallel, **how)
        if dora:
            held = rows if self.input_is_parallel else self.linear_out.weight.shape[0]
            self.weight_magnitude = nn.Parameter(torch.zeros(held))
        self.bfloat16()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        a = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        b = self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata)
        key = f"{prefix}linear_out.weight"
        if self.name.endswith("linear_fc1") and self.config.gated_linear_unit:
            b[key] = apply_swiglu_sharded_factory(b[key], sharded_offsets)
        made = {**a, **b}
        if hasattr(self, "weight_magnitude"):
            key = f"{prefix}weight_magnitude"
            if self.input_is_parallel:
                made[key] = make_sharded_tensor_for_checkpoint(
                    self.weight_magnitude, key, prepend_offsets=sharded_offsets
                )
            else:
                made[key] = make_tp_sharded_tensor_for_checkpoint(
                    self.weight_magnitude, key, 0, prepend_offsets=sharded_offsets
                )
        return made


class Adapters(nn.ModuleDict):
    """The adapters of single projections of a fused linear."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, adapter in self.items():
            made |= adapter.sharded_state_dict(f"{prefix}{key}.", sharded_offsets, metadata)  # type: ignore[operator]
        return made


class Wrapped(nn.Module):
    """A linear beside its adapter. Saved, the linear keeps its own name."""

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.to_wrap, self.adapter, self._adapter_enabled = to_wrap, adapter, True

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        wrapped, adapter = self.to_wrap.sharded_state_dict, self.adapter.sharded_state_dict
        made = wrapped(prefix, sharded_offsets, metadata)  # type: ignore[operator]
        return {**made, **adapter(f"{prefix}adapter.", sharded_offsets, metadata)}  # type: ignore[operator]


def wrap_linears(chunk: nn.Module, kind: str, rank: int, alpha: float) -> None:
    """Wraps every linear of attention and MLP: kind is lora, dora or canonical."""
    for name, module in list(chunk.named_modules()):
        parent, _, end = name.rpartition(".")
        if end not in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            continue
        base: Any = module
        config, expert = base.config, ".local_experts." in name
        heads = {"q": config.num_attention_heads, "k": config.num_query_groups, "v": config.num_query_groups}
        rows = {f"adapter_{role}": count * config.kv_channels for role, count in heads.items()}
        if end == "linear_fc1":
            rows = dict.fromkeys(("adapter_gate", "adapter_up"), base.output_size // 2)
        how: dict[str, Any] = {"rank": rank, "alpha": alpha, "dora": kind == "dora", "expert": expert}
        if kind == "canonical" and end in ("linear_qkv", "linear_fc1"):
            adapter: nn.Module = Adapters({key: Adapter(name, base, rows=count, **how) for key, count in rows.items()})
        else:
            adapter = Adapter(name, base, rows=base.output_size, **how)
        setattr(chunk.get_submodule(parent), end, Wrapped(base, adapter))


def fill(parameter: Tensor, values: Tensor) -> None:
    """Sets a parameter, whose shard must have its shape."""
    assert parameter.shape == values.shape, (parameter.shape, values.shape)
    with torch.no_grad():
        parameter.copy_(values)
