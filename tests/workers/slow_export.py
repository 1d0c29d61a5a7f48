"""`scripts/export.py`, a bundle every fifth of a second: time for Ctrl-C."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import scripts.progress
from export.progress import NoProgress, Progress
from scripts import cli
from scripts.export import export


class Slow(NoProgress):
    def advance(self, *, tensors: int, nbytes: int) -> None:
        print("a bundle", flush=True)
        time.sleep(0.2)


@contextmanager
def slow(what: str) -> Iterator[Progress]:
    yield Slow()


if __name__ == "__main__":
    scripts.progress.progress = slow  # type: ignore[assignment]
    cli.run("export", export)
