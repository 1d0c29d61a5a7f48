"""Processes that share an export without talking: at once, one by one, killed, started twice or too late."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.export.disk.shard_layout import plan_layout
from amaxbridge.export.disk.staging import Share, StagedDirectory
from amaxbridge.export.output.provenance import MADE_FROM, RECORD_FILE
from amaxbridge.mappings.errors import CheckpointError, UsageError, WriteError
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.launcher import LiveRanks
from tests.support.paths import ENVIRONMENT, ROOT, WORKERS


@dataclass
class Process:
    """A process of an export."""

    pid: int
    log: Path
    ask: Callable[[object], int]

    @property
    def paused(self) -> Path:
        return Path(f"{self.log}.paused")

    def until_paused(self) -> None:
        limit = time.monotonic() + 300  # on a busy machine
        while not self.paused.exists():
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.01)

    def go_on(self) -> None:
        self.paused.unlink()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.ask({"join": self.pid}) == -signal.SIGKILL

    def end(self, status: int = 0) -> str:
        """Waits for the process, which must end with a status, and returns what it printed."""
        found = self.ask({"join": self.pid})
        said = self.log.read_text()
        assert found == status, said
        assert "Traceback" not in said
        return said


class Exports:
    """Starts processes in one directory, whose output is `out`."""

    def __init__(self, words: list[str], directory: Path, ask: Callable[[object], int]) -> None:
        self.words, self.directory, self.ask = [*words], directory, ask
        self.logs = directory.with_name(directory.name + "_logs")
        directory.mkdir()
        self.logs.mkdir()

    def start(self, rank: int, world: int, *more: str, pause: int = 0) -> Process:
        log = self.logs / f"{len(list(self.logs.iterdir()))}.txt"
        log.touch()
        request = {"words": [*self.words, *more], "rank": rank, "world": world, "cwd": str(self.directory)}
        return Process(self.ask({**request, "log": str(log), "pause": pause}), log, self.ask)

    def files(self) -> dict[str, bytes]:
        """The files of the output. Nothing else must be left in the directory."""
        assert [path.name for path in self.directory.iterdir()] == ["out"]
        return {path.name: path.read_bytes() for path in (self.directory / "out").iterdir()}


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[object], int]]:
    command = [sys.executable, WORKERS / "apart.py"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def ask(request: object) -> int:
            assert server.stdin is not None
            assert server.stdout is not None
            print(json.dumps(request), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield ask


@pytest.fixture(scope="module")
def words(live: LiveRanks) -> list[str]:
    checkpoint = live.at(tp=2) / "checkpoint"
    return [f"checkpoint={checkpoint}", f"hf={live.hf}", "output=out", "io.max_shard_gb=3e-5", "quant_state=true"]


@pytest.fixture(scope="module")
def alone(words: list[str], ask: Callable[[object], int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process writes."""
    exports = Exports(words, tmp_path_factory.mktemp("alone") / "work", ask)
    exports.start(0, 1).end()
    return exports.files()


@pytest.fixture
def exports(words: list[str], ask: Callable[[object], int], tmp_path: Path) -> Exports:
    return Exports(words, tmp_path / "work", ask)


@pytest.mark.parametrize("world", [2, 3])
def test_at_once(exports: Exports, alone: dict[str, bytes], world: int) -> None:
    """The bytes of one process, the card and `amaxbridge.json` included; the last to end says what was exported."""
    said = [process.end() for process in [exports.start(rank, world) for rank in range(world)]]
    assert exports.files() == alone
    assert sum("modules quantized" in each for each in said) == 1


def test_one_after_another(exports: Exports, alone: dict[str, bytes]) -> None:
    said = exports.start(1, 2).end()
    assert "rank 1 of 2 has written its share; " in said
    assert not (exports.directory / "out").exists()
    assert "modules quantized" in exports.start(0, 2).end()
    assert exports.files() == alone


@pytest.mark.parametrize("again", [[(1, 2)], [(0, 1)], [(0, 3), (1, 3), (2, 3)]])
def test_a_rank_is_killed(exports: Exports, alone: dict[str, bytes], again: list[tuple[int, int]]) -> None:
    """The same rank continues, or one process does the rest, or three do."""
    killed = exports.start(1, 2, pause=3)
    killed.until_paused()
    exports.start(0, 2).end()
    killed.kill()
    (journal,) = (exports.directory / "out.partial").glob(".done-1-*")
    assert 0 < len(journal.read_text().splitlines()) < 9
    for process in [exports.start(rank, world) for rank, world in again]:
        process.end()
    assert exports.files() == alone


def test_while_one_is_at_work(exports: Exports, alone: dict[str, bytes]) -> None:
    """The same rank, another number of processes, another plan: each is refused, and disturbs nothing."""
    first = exports.start(0, 2, pause=2)
    first.until_paused()
    message = exports.start(0, 2).end(2)
    assert "rank 0: error: another process of rank 0 is writing" in message
    assert message.count("\n") == 1
    for rank, world, *more in [(2, 3), (0, 1), (1, 2, "scheme=none")]:
        assert "another run is writing" in exports.start(rank, world, *more).end(2)
    first.go_on()
    first.end()
    exports.start(1, 2).end()
    assert exports.files() == alone


def test_another_plan_when_the_first_is_dead(exports: Exports, alone: dict[str, bytes]) -> None:
    other = exports.start(0, 2, "scheme=none", "quant_state=false", pause=2)
    other.until_paused()
    other.kill()
    processes = [exports.start(rank, 2) for rank in (1, 0)]
    for process in processes:
        process.end()
    assert exports.files() == alone


def test_too_late(exports: Exports, alone: dict[str, bytes]) -> None:
    """A rank that starts after the others have finished: it does no harm, and does not fail."""
    for rank in (1, 0):
        exports.start(rank, 2).end()
    for more in ([], ["io.overwrite=true"]):
        assert "the other ranks have already written" in exports.start(1, 2, *more).end()
    assert "exists and is not empty" in exports.start(0, 1).end(2)
    assert "exists and is not empty" in exports.start(1, 2, "scheme=none").end(2)
    assert exports.files() == alone


def test_one_fails(exports: Exports, live: LiveRanks, tmp_path: Path) -> None:
    """The failing rank says why. The others write their share, say what is missing, and keep their work."""
    checkpoint = shutil.copytree(live.at(tp=2) / "checkpoint", tmp_path / "checkpoint")
    opened = DistCheckpoint(checkpoint)
    for index, place in opened._metadata.storage_data.items():
        if index.fqn == "output_layer.weight":
            with open(opened.directory / place.relative_path, "r+b") as file:
                file.seek(place.offset)
                file.write(bytes(place.length))
    exports.words[0] = f"checkpoint={checkpoint}"
    first, second = exports.start(0, 2), exports.start(1, 2)
    assert "rank 0 of 2 has written its share" in first.end()
    said = second.end(1)
    assert "rank 1: error:" in said
    assert "cannot be read: the bytes of a tensor are damaged, copy the files again" in said
    assert "output_layer.weight" in said
    assert "weights_only" not in said
    assert "out.partial keeps 18 finished bundles" in exports.start(1, 2).end(1)


class TestTheEnd:
    """Two processes have written everything; one comes to the end first, and the other waits for it."""

    @pytest.fixture
    def two(self, tmp_path: Path) -> list[StagedDirectory]:
        layout = plan_layout({"w": TensorSpec((4,), torch.uint8)})
        two = [StagedDirectory(tmp_path / "out", "plan", Share(rank, 2), output="output") for rank in range(2)]
        for staged in two:
            assert staged.open(layout) == frozenset()
        for staged in two:
            assert staged.journal is not None
            staged.journal.write_text(f'"bundle {staged.journal}"\n')
        return two

    def bundles(self, two: list[StagedDirectory]) -> list[str]:
        return [f"bundle {staged.journal}" for staged in two]

    def test_it_succeeds(self, two: list[StagedDirectory], tmp_path: Path) -> None:
        first, second = two
        assert first.left([*self.bundles(two), "a third"]) == 1
        with ThreadPoolExecutor() as pool, first, second:
            assert first.left(self.bundles(two)) == 0
            waiting = pool.submit(second.left, self.bundles(two))
            first.write_file(RECORD_FILE, json.dumps({MADE_FROM: "output"}).encode())
            time.sleep(0.1)
            assert not waiting.done()
            first.commit()
            assert waiting.result() is None
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD_FILE, "model.safetensors"]

    def test_it_is_interrupted(self, two: list[StagedDirectory], tmp_path: Path) -> None:
        """The other process takes over."""
        first, second = two
        with pytest.raises(KeyboardInterrupt), first:
            assert first.left(self.bundles(two)) == 0
            raise KeyboardInterrupt
        with second:
            assert second.left(self.bundles(two)) == 0
            second.commit()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_it_finds_a_fault(self, two: list[StagedDirectory], tmp_path: Path) -> None:
        """Everything is discarded, and both processes say so."""
        first, second = two
        with pytest.raises(CheckpointError), first:
            assert first.left(self.bundles(two)) == 0
            raise CheckpointError("it would not serve right")
        with pytest.raises(WriteError, match="another process has given up"), second:
            second.left(self.bundles(two))
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes are refused with what they need; one process works without locks."""

    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    layout = plan_layout({"w": TensorSpec((4,), torch.uint8)})
    with pytest.raises(WriteError, match=r"No locks available\. Several processes need a file system whose locks hold"):
        StagedDirectory(tmp_path / "out", "plan", Share(0, 2)).open(layout)
    assert list(tmp_path.iterdir()) == []
    with StagedDirectory(tmp_path / "out", "plan") as alone:
        assert alone.open(layout) == frozenset()
        alone.commit()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_rank_that_is_none() -> None:
    with pytest.raises(UsageError, match="RANK=2 of WORLD_SIZE=2: ranks are 0 to 1"):
        Share(2, 2)


def test_a_dry_run_is_one_ranks(exports: Exports) -> None:
    first, second = (exports.start(rank, 2, "dry_run=true").end() for rank in range(2))
    assert "plan for out" in first
    assert second == ""
