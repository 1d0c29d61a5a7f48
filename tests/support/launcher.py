"""Launches scripts on real Megatron ranks, and keeps what the ranks of each topology wrote."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.made_once import made_once
from tests.support.paths import ENVIRONMENT, ROOT, WORKERS


class Launcher:
    """Runs scripts on real ranks, in processes forked from one that has Megatron imported; see zygote.py."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._zygote = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("zygote.py")],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(logs / "zygote.txt").open("w"),
            text=True,
            cwd=ROOT,
        )

    def __call__(self, *command: object, processes: int = 1, cwd: Path = ROOT) -> str:
        """Runs a script on ranks, in the directory `cwd`, and returns what they all printed.

        Raises:
            AssertionError: a rank failed; shows what they printed.
        """
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        argv = [str(word) for word in command]
        log = self._logs / f"{len(list(self._logs.iterdir()))}.txt"
        request = {"argv": argv, "processes": processes, "log": str(log), "cwd": str(cwd)}
        print(json.dumps(request), file=self._zygote.stdin, flush=True)
        status = self._zygote.stdout.readline().strip()
        assert status == "0", f"{' '.join(argv)} ended with {status or 'the zygote'}:\n{log.read_text()}"
        return log.read_text()

    def results(self, function: Callable[[int], Any], directory: Path, *, processes: int) -> list[Any]:
        """Calls a function of a module with the rank on each rank, and returns the results in rank order."""
        self(WORKERS / "on_ranks.py", function.__module__, function.__name__, directory, processes=processes)
        return [pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(processes)]

    def close(self) -> None:
        self._zygote.communicate()


class LiveRanks:
    """Runs a worker once per topology, when first asked for.

    Args:
        launch: starts the ranks.
        worker: name of the script.
        hf: directory of the model.
        root: where each topology gets a directory.
    """

    def __init__(self, launch: Launcher, worker: str, hf: Path, root: Path) -> None:
        self.hf = hf
        self._launch = launch
        self._worker = WORKERS / worker
        self._root = root

    def at(self, *, processes: int = 0, **sizes: int) -> Path:
        """The directory of everything that the ranks of a topology wrote.

        Args:
            processes: how many; without it, what TP and PP need.
            sizes: as `megatron.distributed` takes them.
        """
        sizes = {"tp": 1, **sizes}
        processes = processes or sizes["tp"] * sizes.get("pp", 1)
        directory = self._root / f"{processes}_{''.join(f'{axis}{size}' for axis, size in sizes.items())}"

        def run(directory: Path) -> None:
            self._launch(self._worker, self.hf, directory, json.dumps(sizes), processes=processes)

        return made_once(directory, run)

    def report(self, **sizes: int) -> dict[str, Any]:
        """The worker's report: messages of warnings and errors."""
        report: dict[str, Any] = json.loads((self.at(**sizes) / "report.json").read_text())
        return report
