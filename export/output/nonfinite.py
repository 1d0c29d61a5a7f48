"""NaN and Inf in tensors that stay unquantized: found while they are written, and named.

A weight that is quantized must be finite in any case: its codes and scales could not hold it.
"""

import logging
from collections.abc import Mapping
from enum import StrEnum

import torch
from torch import Tensor

from amaxbridge.mappings.errors import MappingError, UsageError

_log = logging.getLogger("amaxbridge")


class NonFinite(StrEnum):
    """What to do about NaN or Inf in a tensor that stays unquantized."""

    WARN = "warn"
    ERROR = "error"


def nonfinite_policy(name: str) -> NonFinite:
    """Returns the policy of this name.

    Raises:
        UsageError: unknown name. The message lists the known ones.
    """
    try:
        return NonFinite(name)
    except ValueError:
        raise UsageError(f"Unknown nonfinite={name}. Use one of {', '.join(NonFinite)}") from None


class FiniteCheck:
    """Looks at the rows of tensors as they pass, and names each tensor once.

    Args:
        policy: what to do.
    """

    def __init__(self, policy: NonFinite) -> None:
        self.policy = policy
        self.found: list[str] = []

    def look_at(self, name: str, rows: Tensor) -> None:
        """Checks some rows of a tensor.

        Raises:
            MappingError: they hold NaN or Inf, and the policy is `error`.
        """
        if not _can_be(rows) or name in self.found:
            return
        least, greatest = rows.aminmax()  # one pass; NaN is passed on
        if least.isfinite() and greatest.isfinite():
            return
        self.found.append(name)
        what = f"{name} holds NaN or Inf, and stays unquantized"
        if self.policy is NonFinite.ERROR:
            raise MappingError(f"{what}. Mend the source, or give nonfinite=warn")
        _log.warning("%s: engines will compute NaN from it", what)

    def look_at_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Checks many tensors, all GPU ones on one device, and waits for it once.

        Raises:
            MappingError: one holds NaN or Inf, and the policy is `error`.
        """
        on_gpu = [tensor for tensor in tensors.values() if tensor.is_cuda and _can_be(tensor)]
        extremes = [each.float() for tensor in on_gpu for each in tensor.aminmax()]
        are_finite = not extremes or bool(torch.stack(extremes).isfinite().all())
        for name, tensor in tensors.items():
            if not (are_finite and tensor.is_cuda):
                self.look_at(name, tensor)


def _can_be(tensor: Tensor) -> bool:
    """True for a tensor that may hold NaN or Inf."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() > 0
