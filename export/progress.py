"""How long work tells how far it is.

Whoever does the work calls `begin` once and `advance` after every bundle; what is made of it, a bar, a line in a log,
or nothing, is for the caller to choose. Bytes are those of the source: both an export from Megatron and model-free
quantization know them for each bundle before it is read.
"""

from typing import Protocol


class Progress(Protocol):
    """Told by the work; several threads may advance it."""

    def begin(self, *, tensors: int, nbytes: int, kept: int = 0) -> None:
        """So much is to be done.

        Args:
            tensors: of the source, to be read by this process.
            nbytes: of these, and of what is `kept`.
            kept: bytes of what an earlier run that was interrupted has finished already.
        """

    def advance(self, *, tensors: int, nbytes: int) -> None:
        """So much more is done."""


class NoProgress:
    """Tells nobody."""

    def begin(self, *, tensors: int, nbytes: int, kept: int = 0) -> None:
        pass

    def advance(self, *, tensors: int, nbytes: int) -> None:
        pass
