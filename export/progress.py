"""The protocol by which long work reports progress.

The work calls `begin` once and `advance` after every bundle; the caller chooses what to show: a bar, a log line or
nothing. Bytes are the source's, which every export knows for each bundle before it is read.
"""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of the work; several threads may advance it."""

    def begin(self, *, tensors: int, nbytes: int, kept: int = 0) -> None:
        """Announces the work.

        Args:
            tensors: number of source tensors that this process will read.
            nbytes: their bytes, plus `kept`.
            kept: bytes that an earlier, interrupted run finished.
        """

    def advance(self, *, tensors: int, nbytes: int) -> None:
        """Reports finished work."""


class NoProgress:
    """Shows nothing."""

    def begin(self, *, tensors: int, nbytes: int, kept: int = 0) -> None:
        pass

    def advance(self, *, tensors: int, nbytes: int) -> None:
        pass
