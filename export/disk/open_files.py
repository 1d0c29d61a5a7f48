"""A bounded number of open files, whatever the number of shards: systems allow a process 1,024, or 256."""

import os
import threading
from collections.abc import Callable

MOST = 48
"""Files that one reader or writer keeps open. There are a few of these at once, and libraries open files, too."""


class Descriptor:
    """An open file, closed when nobody uses it any more."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class OpenFiles:
    """Open files by name. Any number of threads use them; the one unused for longest is let go for another.

    A file that is let go while a thread uses it stays open until that thread is through.

    Args:
        most: number of files to keep open.
        before: called with the number of a file that is let go for another, while it is still open.
    """

    def __init__(self, most: int = MOST, *, before: Callable[[int], None] | None = None) -> None:
        self._most, self._before = most, before
        self._files: dict[str, Descriptor] = {}
        self._mutex = threading.Lock()

    def get(self, name: str, make: Callable[[], int]) -> Descriptor:
        """The file of this name; `make` opens it where it is not open."""
        with self._mutex:
            file = self._files.pop(name, None) or Descriptor(make())
            self._files[name] = file  # as the last one used
            while len(self._files) > self._most:
                unused = self._files.pop(next(iter(self._files)))
                if self._before is not None:
                    self._before(unused.number)
            return file

    def drop(self, name: str) -> None:
        """Lets one file go."""
        with self._mutex:
            self._files.pop(name, None)

    def close(self) -> None:
        """Lets all files go."""
        with self._mutex:
            self._files.clear()
