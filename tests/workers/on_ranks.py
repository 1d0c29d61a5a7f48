"""Calls one function on every rank, and keeps what it returns.

    torchrun --nproc-per-node N on_ranks.py MODULE FUNCTION OUT_DIR

OUT_DIR/RANK.pickle is the result of FUNCTION(rank).
"""

import pickle
import sys
from importlib import import_module
from pathlib import Path

from amaxbridge.bridge.live.process_ranks import process_group, world_rank

if __name__ == "__main__":
    with process_group():
        result = getattr(import_module(sys.argv[1]), sys.argv[2])(world_rank())
    (Path(sys.argv[3]) / f"{world_rank()}.pickle").write_bytes(pickle.dumps(result))
