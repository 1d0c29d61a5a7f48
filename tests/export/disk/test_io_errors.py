"""Errors of the file system at every operation, and a bounded number of open files."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from amaxbridge.export.disk import shard_writer
from amaxbridge.export.disk.open_files import OpenFiles
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import AmaxbridgeError, CheckpointError, UsageError, WriteError
from tests.support.checkpoints import dense_model, write_checkpoint
from tests.support.file_operations import watched
from tests.support.paths import ENVIRONMENT, ROOT

OLD = {"config.json": b"{}", "model.safetensors": b"other weights"}
EVERY = int(os.environ.get("EVERY", 20))  # one of so many operations is tried; `make test-faults` tries all
NEXT_STEPS = {
    errno.EIO: "the disk or its server failed",
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EACCES: "make it writable|choose another output",
    errno.EROFS: "make it writable|choose another output",
    errno.EMFILE: "ulimit -n",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_checkpoint(tmp_path_factory.mktemp("source") / "in", dense_model(1))
    (made / "sub").mkdir()
    (made / "sub" / "notes.txt").write_text("carried")
    return made


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", NEXT_STEPS, ids=errno.errorcode.get)
def test_at_every_operation(
    source: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error that names a file and the next step, or none where the file system lets the work be done otherwise; the
    old output or the new one whole; and the next run ends well.
    """
    monkeypatch.setattr(shard_writer, "_SYNC_BYTES", 1 << 15)
    out, outcomes = tmp_path / "out", Counter[str]()
    count = 0

    def counted(name: str, at: int) -> None:
        nonlocal count
        count = at + 1

    def run(overwrite: bool = True) -> None:
        model_free_ptq(source, out, "nvfp4a16", overwrite=overwrite)

    with watched(out, counted):
        run()
    whole = files(out)
    tried = range(number % EVERY, count, EVERY)
    for wanted in tried:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, content in OLD.items():
            (out / name).write_bytes(content)

        def failing(name: str, at: int, wanted: int = wanted) -> None:
            if at == wanted:
                raise OSError(number, os.strerror(number))

        try:
            with watched(out, failing):
                run()
            outcomes["done all the same"] += 1
            assert files(out) == whole, wanted
        except AmaxbridgeError as error:
            outcomes[type(error).__name__] += 1
            said = "".join([str(error), *getattr(error, "__notes__", ())])
            assert str(out) in said
            reading = isinstance(error, CheckpointError)  # the output once more, to verify it
            assert reading or isinstance(error, WriteError | UsageError), said
            steps = ["make it readable"] if reading else []
            assert any(step in said for step in [*steps, *NEXT_STEPS[number].split("|")]), said
            assert files(out) in (OLD, whole), wanted
        run()
        assert files(out) == whole, wanted
        assert [path.name for path in tmp_path.iterdir()] == ["out"], wanted
    with capsys.disabled():
        print(json.dumps({errno.errorcode[number]: {"operations": count, "tried": len(tried), **outcomes}}))
    assert sum(outcomes.values()) == len(tried) >= count // EVERY > 4
    assert outcomes["WriteError"] > len(tried) / 2


def test_directories_that_are_carried_are_synced(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory of the output is synced before the move."""
    synced, moved, sync, rename = set[str](), False, os.fsync, os.rename

    def noting(file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        if not moved:
            synced.add(path)
        sync(file)

    def moving(*paths: Path) -> None:
        nonlocal moved
        moved = True
        rename(*paths)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "rename", moving)
    model_free_ptq(source, tmp_path / "out", "nvfp4a16")
    new = tmp_path / "out.partial" / "new"
    made = [new, *(new / path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*"))]
    assert len(made) == 8
    assert {str(path) for path in made} <= synced


class TestOpenFiles:
    def test_hundreds_of_shards(self, tmp_path: Path) -> None:
        """400 files in and out, quantized and verified, where a process may open 256."""
        torch.manual_seed(0)
        tensors = {f"model.layers.{index}.mlp.down_proj.weight": torch.randn(32, 32).bfloat16() for index in range(400)}
        source = write_checkpoint(
            tmp_path / "in", tensors, cuts=list(tensors)[1:], config={"architectures": ["LlamaForCausalLM"]}
        )
        assert len(list(source.glob("*.safetensors"))) == 400
        code = (
            "import resource, sys\nfrom amaxbridge.export.model_free.whole_directory import model_free_ptq\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
            "model_free_ptq(sys.argv[1], sys.argv[2], 'nvfp4a16', max_workers=8)\n"
            "from amaxbridge.export.verify import verify\n"
            "verify(__import__('pathlib').Path(sys.argv[2])).conclude(sys.argv[2])\n"
        )
        command = [sys.executable, "-c", code, source, tmp_path / "out"]
        ended = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 400
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert limit[0] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def test_files_in_use_stay_open(self, tmp_path: Path) -> None:
        def opened(name: str) -> int:
            return os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)

        left: list[int] = []
        pool = OpenFiles(2, before=left.append)
        first = pool.get("a", lambda: opened("a"))
        assert pool.get("a", lambda: 1 // 0) is first
        for name in "bcd":
            pool.get(name, lambda name=name: opened(name))
        assert left[0] == first.number
        os.write(first.number, b"still open")
        number = first.number
        del first
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
        assert (tmp_path / "a").read_bytes() == b"still open"


def test_a_source_that_cannot_be_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def failing(file: int, buffers: object, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{file}").endswith("in/model.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", failing)
    from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint

    message = r"in/model\.safetensors cannot be read: .*; the disk or its server"
    with SafetensorsCheckpoint(source) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.read("lm_head.weight")
