"""`scripts/export.py`, a bundle every fifth of a second: time for Ctrl-C."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from amaxbridge import cli
from amaxbridge.export.progress import NoProgress, Progress
from amaxbridge.scripts import progress_bar
from amaxbridge.scripts.export import export


class Slow(NoProgress):
    def advance(self, *, tensors: int, nbytes: int) -> None:
        print("a bundle", flush=True)
        time.sleep(0.2)


@contextmanager
def slow(what: str) -> Iterator[Progress]:
    yield Slow()


if __name__ == "__main__":
    progress_bar.progress = slow  # type: ignore[assignment]
    cli.run("export", export)
