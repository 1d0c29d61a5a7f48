"""Megatron's gated delta nets without flash-linear-attention, whose kernels need CUDA: for tests on a CPU."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from amaxbridge.bridge.megatron.patches import Patch, patched
from amaxbridge.mappings.extras import installed


@contextlib.contextmanager
def without_fla() -> Iterator[None]:
    """Inside, gated delta nets are built, and run in Megatron's deterministic mode. Nothing changes where fla is.

    That mode is plain torch but for one function of fla, which is here.
    """
    if installed("fla"):
        yield
        return
    from megatron.core.ssm import gated_delta_net

    common = getattr(gated_delta_net, "common", gated_delta_net)  # a module until 0.18
    with patched(Patch(common, "HAVE_FLA", True), Patch(common, "l2norm", _l2norm)):
        yield


def _l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + eps)
