"""The exceptions of amaxbridge, one tree.

    AmaxbridgeError                 every error that a user can act on
    ├── UsageError                  wrong arguments: nothing was started            (exit status 2)
    │   ├── UnknownArchitectureError
    │   └── OutputExistsError
    ├── MappingError                a tensor does not fit its mapping
    │   ├── UnmappedParameterError  a Megatron parameter that no mapping takes
    │   └── AmbiguousMappingError   two mappings claim one name
    ├── AmaxError                   a missing, zero, negative or non-finite amax
    ├── CheckpointError             files on disk that are damaged, missing or of another kind
    └── WriteError                  the disk is full; what is written is kept, and a second run continues

They live in the lowest package because every other one raises them. A message says what, where and what next;
problems of one kind are collected and raised together (`listing` formats them).
"""

from collections.abc import Iterable


class AmaxbridgeError(Exception):
    """Base of every error that the user can act on.

    Args:
        exit_status: exit status of the command line.
        rank: the rank that alone met the error; None if all ranks raise it.
    """

    exit_status = 1
    rank: int | None = None


class UsageError(AmaxbridgeError):
    """The arguments cannot work; nothing was started."""

    exit_status = 2


class UnknownArchitectureError(UsageError):
    """No model family claims the `architectures` entry of config.json."""


class OutputExistsError(UsageError):
    """The output directory exists, is not empty, and `overwrite` was not given."""


class MappingError(AmaxbridgeError, ValueError):
    """A tensor does not fit its mapping: the message names the tensor, its shapes and the rank."""


class UnmappedParameterError(MappingError):
    """Megatron parameters or quantizers that no mapping of the family takes."""


class AmbiguousMappingError(MappingError):
    """Two mappings claim the same name, in Megatron or in Hugging Face spelling."""


class AmaxError(AmaxbridgeError, ValueError):
    """Quantizer state that cannot become a scale: missing, zero, negative, NaN or infinite."""


class CheckpointError(AmaxbridgeError):
    """A checkpoint directory that is incomplete or is not what its metadata says."""


class WriteError(AmaxbridgeError):
    """The disk has no room for the output. What is written is kept, and the same command continues from it."""


def listing(items: Iterable[object], most: int = 8) -> str:
    """One indented line for each of the first `most` items, then how many more there are."""
    rows = [str(item) for item in items]
    shown = "".join(f"\n  {row}" for row in rows[:most])
    return shown + (f"\n  … and {len(rows) - most} more" if len(rows) > most else "")
