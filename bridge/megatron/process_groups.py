"""Megatron's process groups."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel

from amaxbridge.bridge.live.process_ranks import ProcessRanks, process_group
from amaxbridge.bridge.megatron.without_cuda import without_cuda
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.ranks import Axis


def process_ranks() -> ProcessRanks:
    """This process in the groups of Megatron's parallel state."""
    return ProcessRanks(
        {
            Axis.TP: parallel_state.get_tensor_model_parallel_group(),
            Axis.ETP: parallel_state.get_expert_tensor_parallel_group(),
            Axis.EP: parallel_state.get_expert_model_parallel_group(),
            Axis.PP: parallel_state.get_pipeline_model_parallel_group(),
            Axis.DP: parallel_state.get_data_parallel_group(),
        }
    )


@contextlib.contextmanager
def distributed(
    *, tp: int, pp: int = 1, vpp: int | None = None, ep: int = 1, etp: int | None = None, seed: int = 1234
) -> Iterator[None]:
    """Opens Megatron's process groups and sets random seeds, in a process of `torchrun` or a single one.

    Without CUDA, Megatron and ModelOpt are patched inside to run on the CPU: see `without_cuda`.

    Args:
        vpp: model chunks of each pipeline rank; None for one chunk, without a virtual pipeline.
        ep: expert-parallel size. Experts are spread over the ranks that tensor and data parallelism leave or share.
        etp: tensor-parallel size of the experts; None for `tp`.
    """
    with without_cuda(), process_group():
        parallel_state.initialize_model_parallel(
            tp, pp, vpp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def parallel_state_of(**sizes: int | None) -> Iterator[None]:
    """The parallel state that there is, or one that is opened for a while.

    Args:
        sizes: those of `distributed`, which are 1 where they are not given.

    Raises:
        UsageError: there is a parallel state, which has sizes already, or a name is no size.
    """
    known = {"tp", "pp", "vpp", "ep", "etp"}
    if unknown := sizes.keys() - known:
        raise UsageError(f"unknown argument {', '.join(sorted(unknown))}=; sizes are {', '.join(sorted(known))}")
    if not parallel_state.model_parallel_is_initialized():
        with distributed(**{"tp": 1, **sizes}):  # type: ignore[arg-type]
            yield
    elif sizes:
        raise UsageError(f"Megatron's parallel state has its sizes: leave out {', '.join(sizes)}=")
    else:
        yield
