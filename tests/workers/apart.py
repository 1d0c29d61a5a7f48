"""Starts processes of scripts/export.py that know nothing of one another, forked from one that has all imported.

A JSON request a line: {"words", "rank", "world", "cwd", "log", "pause"} starts one and answers its process id;
{"join": PID} answers its exit status. Each bundle is synced and noted before the next one begins. A process that is to
pause after some bundles makes the file LOG.paused, and goes on when it is removed.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amaxbridge import cli
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.output import finished_directory
from amaxbridge.export.progress import NoProgress, Progress
from amaxbridge.scripts import progress_bar
from amaxbridge.scripts.export import export
from tests.support.zygote import prepare

IMPORTED = (
    "amaxbridge.bridge.auto",
    "amaxbridge.bridge.plan.dry_run",
    "amaxbridge.scripts.tables",
    "transformers.models.auto",
    "hydra",
)


class Pausing(NoProgress):
    def __init__(self, bundles: int, mark: Path) -> None:
        self._left, self._mark = bundles, mark

    def advance(self, *, tensors: int, nbytes: int) -> None:
        self._left -= 1
        if self._left == 0:
            self._mark.touch()
            while self._mark.exists():
                time.sleep(0.01)


class NotingWriter(ShardWriter):
    """Notes each bundle in the thread that wrote it, not when the thread that syncs comes to it."""

    def done(self, bundle: str) -> None:
        self._done.append(bundle)
        self._sync()


def start(words: list[str], rank: int, world: int, cwd: str, log: str, pause: int) -> int:
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(cwd)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    finished_directory.ShardWriter = NotingWriter

    @contextlib.contextmanager
    def progress(what: str) -> Iterator[Progress]:
        yield Pausing(pause, Path(f"{log}.paused"))

    progress_bar.progress = progress
    sys.argv = ["export.py", *words]
    status = 1
    try:
        cli.run("export", export)
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def answer(request: dict[str, Any]) -> int:
    if "join" in request:
        return os.waitstatus_to_exitcode(os.waitpid(request["join"], 0)[1])
    return start(**request)


if __name__ == "__main__":
    prepare(IMPORTED)
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)
