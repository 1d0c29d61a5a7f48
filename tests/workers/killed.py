"""Runs of model-free PTQ that are killed, one after another: SOURCE TARGET KILLS SEED.

Each is forked from this process, which has everything imported and no threads, so that a kill hits the work itself.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from amaxbridge.export.disk import shard_writer
from amaxbridge.export.model_free.whole_directory import model_free_ptq


def start(source: Path, target: Path) -> int:
    child = os.fork()
    if not child:
        shard_writer._SYNC_BYTES = 1 << 15  # so that there is something to go on from
        try:
            model_free_ptq(source, target, "nvfp4a16", max_workers=2, overwrite=True)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def main(source: Path, target: Path, kills: int, seed: int) -> None:
    """Prints, for each kill, whether the target was there and whole: as the run before the first kill left it."""
    assert os.waitpid(start(source, target), 0)[1] == 0  # whose loops may have to be compiled
    begin = time.monotonic()
    assert os.waitpid(start(source, target), 0)[1] == 0
    length = time.monotonic() - begin
    whole = {path.name: path.read_bytes() for path in target.iterdir()}
    moments, found, left = random.Random(seed), [], 0
    for _ in range(kills):
        child = start(source, target)
        time.sleep(moments.uniform(0, length))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append({path.name: path.read_bytes() for path in target.iterdir()} == whole)
        left += target.with_name(target.name + ".partial").exists()
    print(json.dumps({"whole": all(found), "kills": len(found), "left unfinished": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
