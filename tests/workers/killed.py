"""Runs of model-free PTQ that are killed, each followed by one that is not: SOURCE TARGET KILLS SEED HOW.

Half of the kills come at any moment, half before the n-th operation on a file, for n spread over all of them. HOW says
how the output comes into place:

    absent      there is nothing at TARGET, and nothing may be overwritten
    exchanged   TARGET holds another model, which is replaced
    two_moves   the same on a file system that cannot exchange directories
    inside      the same where TARGET must stay: it is the current directory

Each run is forked from this process, which has everything imported and no threads, so that a kill hits the work itself.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from amaxbridge.build_version import build_version
from amaxbridge.export.disk import atomic_move, shard_writer
from amaxbridge.export.disk.output_place import INSIDE
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from tests.support.file_operations import watched


def start(source: Path, target: Path, how: str, last: int = -1) -> int:
    """Starts a run, which kills itself before the operation numbered `last`. Its exit status is 0, 1 or SIGKILL."""
    child = os.fork()
    if child:
        return child
    shard_writer._SYNC_BYTES = 1 << 15  # so that there is something to go on from
    if how == "inside":
        os.chdir(target)
    count = 0

    def reached(name: str, number: int) -> None:
        nonlocal count
        count = number + 1
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with watched(target, reached):
            if how == "two_moves":
                atomic_move._exchange = lambda one, other: False
            model_free_ptq(source, target, "nvfp4a16", max_workers=2, overwrite=how != "absent")
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    (target.parent / "operations").write_text(str(count))
    os._exit(0)


def contents(directory: Path) -> dict[str, bytes] | None:
    if not directory.is_dir():
        return None
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != INSIDE}


def prepare(target: Path, how: str, old: dict[str, bytes]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    if how != "absent":
        target.mkdir()
        for name, content in old.items():
            (target / name).write_bytes(content)


def state(target: Path, how: str, old: dict[str, bytes], whole: dict[str, bytes]) -> str:
    """What a kill left: `old` or `new` whole at the target, with or without an unfinished directory, or `torn`."""
    found = contents(target)
    unfinished = any(path.exists() for path in (target / INSIDE, target.with_name(target.name + ".partial")))
    if found == whole:
        return "new, OUT.partial not removed yet" if unfinished else "new"
    if found == (None if how == "absent" else old):
        return "old, work kept" if unfinished else "old, nothing begun"
    if how == "two_moves" and found is None:
        return "between two moves"
    if how == "inside" and found is not None and "config.json" not in found:
        return "between files, no config.json"
    return "torn"


def main(source: Path, target: Path, kills: int, seed: int, how: str) -> None:
    """Prints what the kills left, and of the runs after them the number that ended with the right bytes alone."""
    build_version()  # asked once: it changes when somebody edits a file meanwhile
    old = {"config.json": b"{}", "model.safetensors": b"other weights", "notes.txt": b"mine"}
    length = 0.0
    for _ in range(2):  # the first may have to compile its loops
        prepare(target, how, old)
        begin = time.monotonic()
        assert os.waitpid(start(source, target, how), 0)[1] == 0
        length = time.monotonic() - begin
    whole = contents(target)
    assert whole is not None
    operations = int((target.parent / "operations").read_text())
    moments, left, right = random.Random(seed), Counter[str](), 0
    for number in range(kills):
        prepare(target, how, old)
        by_operation = number % 2 == 0
        child = start(source, target, how, last=operations * number // kills if by_operation else -1)
        if not by_operation:
            time.sleep(moments.uniform(0, length))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left[state(target, how, old, whole)] += 1
        again = how != "absent" or contents(target) != whole  # else it would be refused: the work is done
        if again:
            os.waitpid(start(source, target, how), 0)
        beside = sorted(path.name for path in target.parent.iterdir() if path.name != "operations")
        alone = not (target / INSIDE).exists() and beside == [target.name]
        right += contents(target) == whole and (alone or not again)
        shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
    print(json.dumps({"kills": kills, "right": right, "operations": operations, "left": dict(sorted(left.items()))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
