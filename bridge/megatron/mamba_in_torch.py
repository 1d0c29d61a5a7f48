"""Megatron's Mamba layers where mamba_ssm, whose kernels need CUDA, is not installed: the same in plain torch.

Megatron's mixer takes two things from mamba_ssm, the scan over the sequence and the gated norm. Here the scan is the
recurrence itself, a step for each token: for tests and the demo, never for a training run.
"""

from typing import Any

import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F


def enable_mamba(config: TransformerConfig) -> None:
    """Patch Megatron's mixer, for models of `config`. Where mamba_ssm is installed, nothing changes."""
    if not mamba_mixer.HAVE_MAMBA_SSM:
        mamba_mixer.HAVE_MAMBA_SSM = True
        mamba_mixer.ExtendedRMSNorm = GatedRMSNorm
        mamba_mixer.mamba_chunk_scan_combined = scan
    if mamba_mixer.mamba_chunk_scan_combined is scan:
        config.use_mamba_mem_eff_path = False  # which is one kernel for the whole mixer


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *, D: Tensor, dt_bias: Tensor, **_: Any
) -> Tensor:
    """The state-space recurrence of Mamba-2 (arXiv 2405.21060): `h = exp(dt A) h + dt B x`, `y = C h + D x`.

    Args:
        x: `[batch, length, heads, head_dim]`.
        dt: `[batch, length, heads]`, before its bias and softplus.
        A: `[heads]`, negative.
        B, C: `[batch, length, groups, state]`; a group serves consecutive heads.
        chunk_size: of mamba_ssm's kernel; not used.
        D, dt_bias: `[heads]`.
    """
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (each.float().repeat_interleave(heads_per_group, dim=2) for each in (B, C))
    step = F.softplus(dt.float() + dt_bias)
    decay = torch.exp(step * A)[..., None, None]
    added = torch.einsum("blh,blhp,blhn->blhpn", step, x.float(), B)
    state, states = torch.zeros_like(added[:, 0]), []
    for token in range(x.shape[1]):
        state = decay[:, token] * state + added[:, token]
        states.append(state)
    y = torch.einsum("blhpn,blhn->blhp", torch.stack(states, dim=1), C)
    return (y + D[:, None] * x.float()).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm of `x · silu(gate)` within groups of `group_size` channels; `[…, hidden]`."""

    def __init__(
        self, hidden_size: int, *, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "Megatron's mixer norms after the gate"
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size
        self.tp_group: Any = None  # set by the mixer

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        gated = (x.float() * F.silu(gate.float())).unflatten(-1, (-1, self.group_size))
        return (F.rms_norm(gated, (self.group_size,), eps=self.eps).flatten(-2) * self.weight.float()).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """The weight under its key in Megatron's checkpoints, channels spread over TP."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
