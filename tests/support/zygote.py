"""Runs scripts in forked processes that have torch, Megatron and ModelOpt imported already.

Importing them takes half a minute of processor time on a slow machine, and the tests start dozens of ranks. This
process imports them once, before any thread or process group exists, and forks a child for each rank. The children
are ordinary processes with the environment that torchrun would give them; `test_cli.py` runs the real torchrun too.

Protocol: one JSON request a line on standard input, {"argv", "processes", "log", "cwd"}; one exit status a line back.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from torch.distributed import TCPStore

IMPORTED = (
    "amaxbridge.bridge.megatron",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.dist_checkpointing",
    "modelopt.torch.opt.plugins",
    "modelopt.torch.quantization",
    "transformers.models.auto",
    "hydra",
    "rich.table",
)


def serve() -> None:
    """Answers requests until standard input closes."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # a compiler warms up in each rank for a handful of tokens
    with contextlib.redirect_stdout(sys.stderr):
        prepare(IMPORTED)
    for line in sys.stdin:
        with _meeting_point() as port:
            status = _run(**json.loads(line), port=port)
        print(json.dumps(status), flush=True)


def prepare(modules: Sequence[str]) -> None:
    """Does what every forked process would do: imports, and what transformers does at the first model."""
    for name in modules:
        importlib.import_module(name)
    conversions = importlib.import_module("transformers.conversion_mapping")
    conversions.get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions, which it then keeps
    gc.collect()
    gc.freeze()  # or each process would walk, and so copy, a million objects that never change


@contextlib.contextmanager
def _meeting_point() -> Iterator[int]:
    """The port of a store where ranks find one another: torchrun's agent, in a process of its own.

    The kernel chooses the port for the socket that listens, so no other process can take it meanwhile.
    """
    here, there = socket.socketpair()
    host = os.fork()
    if host == 0:
        here.close()
        try:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            there.sendall(str(store.port).encode())
            there.recv(1)  # until the other end is closed
        finally:
            os._exit(0)
    there.close()
    with here:
        yield int(here.recv(16))
    os.waitpid(host, 0)


def _run(argv: list[str], processes: int, log: str, cwd: str, port: int) -> int:
    """Forks the ranks and waits for all; the first that fails gives the status and ends the others, who wait for it."""
    children = set[int]()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.chdir(cwd)
            _become_rank(argv, rank, processes, port, log)
        children.add(child)
    failure = 0
    while children:
        child, wait_status = os.wait()
        children.discard(child)
        failed = os.waitstatus_to_exitcode(wait_status)
        if failed and not failure:
            failure = failed
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failure


def _become_rank(argv: list[str], rank: int, processes: int, port: int, log: str) -> None:
    """Runs the script as the main program of this process and exits; never returns."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "zygote"}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    status = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
