"""Megatron's Mamba layers in plain torch, for machines without mamba_ssm, whose kernels need CUDA.

Megatron's mixer uses two functions of mamba_ssm: the scan over the sequence and the gated norm. Here the scan is the
recurrence itself, one step per token: for tests and the demo, never for a training run.
"""

import logging
from typing import Any, cast

import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from amaxbridge.bridge.megatron.patches import Patch, announce, patched


def mixer_class(config: TransformerConfig) -> type[MambaMixer]:
    """Megatron's mixer for models of `config`, or without mamba_ssm the slow `TorchMambaMixer`.

    The slow mixer is announced; on a machine with a GPU, where nobody would expect it, this is a warning.
    """
    if mamba_mixer.HAVE_MAMBA_SSM:
        return cast(type[MambaMixer], MambaMixer)
    config.use_mamba_mem_eff_path = False  # that path is one kernel for the whole mixer
    announce(
        "mamba_ssm is not installed: the Mamba layers of this model run in plain torch, token by token. This "
        "does not slow an import; install mamba_ssm where the model is trained or calibrated",
        logging.WARNING if torch.cuda.is_available() else logging.INFO,
    )
    return TorchMambaMixer


class TorchMambaMixer(MambaMixer):  # type: ignore[misc]  # Megatron is not typed
    """Megatron's mixer with `GatedRMSNorm` and `scan` in place of those of mamba_ssm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with patched(Patch(mamba_mixer, "HAVE_MAMBA_SSM", True), Patch(mamba_mixer, "ExtendedRMSNorm", GatedRMSNorm)):
            super().__init__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with patched(Patch(mamba_mixer, "mamba_chunk_scan_combined", scan)):
            return super().forward(*args, **kwargs)


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *, D: Tensor, dt_bias: Tensor, **_: Any
) -> Tensor:
    """The state-space recurrence of Mamba-2 (arXiv 2405.21060): `h = exp(dt A) h + dt B x`, `y = C h + D x`.

    Args:
        x: `[batch, length, heads, head_dim]`.
        dt: `[batch, length, heads]`, before its bias and softplus.
        A: `[heads]`, negative.
        B, C: `[batch, length, groups, state]`; a group serves consecutive heads.
        chunk_size: argument of mamba_ssm's kernel; not used.
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
