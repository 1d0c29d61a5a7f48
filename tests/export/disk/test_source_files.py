"""Sources that change while they are read end in one error or a fresh start, never in a mixture or a SIGBUS."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.export.disk import safetensors_file
from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.export.disk.strict_json import parse_json_object
from amaxbridge.export.model_free.whole_directory import _described, model_free_ptq
from amaxbridge.mappings.errors import CheckpointError
from tests.support.checkpoints import change_last_byte, cuts_inside_groups, dense_model, write_checkpoint
from tests.support.paths import ENVIRONMENT, ROOT

SHARD = "model-00003-of-00005.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = dense_model()
    made = write_checkpoint(tmp_path / "in", tensors, cuts=cuts_inside_groups(tensors))
    (made / "vocab").mkdir()
    (made / "vocab" / "merges.txt").write_text("a b")
    return made


def _rewritten(file: Path) -> None:
    save_file({name: -each for name, each in load_file(file).items()}, file, metadata={"format": "pt"})


def _replaced(file: Path) -> None:
    shutil.copy(file, file.with_name("x"))
    os.replace(file.with_name("x"), file)


def _in_secret(file: Path) -> None:
    """Changes bytes of a file, and sets its times back; the size stays."""
    times = file.stat()
    change_last_byte(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _longer(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(b" ")


def _removed(file: Path) -> None:
    file.unlink()


def _shorter(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _emptied(file: Path) -> None:
    os.truncate(file, 0)


CHANGES = [_rewritten, _replaced, change_last_byte, _in_secret, _longer, _removed, _shorter, _emptied]


def when(bundles: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Acts once, after some bundles are written."""
    note, calls = ShardWriter.done, 0

    def done(writer: ShardWriter, bundle: str) -> None:
        nonlocal calls
        note(writer, bundle)
        calls += 1
        if calls == bundles:
            act()

    monkeypatch.setattr(ShardWriter, "done", done)


class TestDuringTheRun:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("name", [SHARD, "model-00001-of-00005.safetensors"])
    def test_weights(
        self, source: Path, tmp_path: Path, name: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file that changes has been read already, or not yet."""
        when(5, lambda: change(source / name), monkeypatch)
        with pytest.raises(CheckpointError) as raised:
            model_free_ptq(source, tmp_path / "out", "nvfp4a16")
        assert name in str(raised.value)
        assert "changed while they were read" in str(raised.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "vocab/merges.txt"])
    @pytest.mark.parametrize("change", [change_last_byte, _removed, _replaced, _in_secret])
    def test_small_files(
        self, source: Path, tmp_path: Path, name: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        when(5, lambda: change(source / name), monkeypatch)
        with pytest.raises(CheckpointError, match=name):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    def test_what_is_not_read_may_change(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (source / "optimizer.pt").touch()
        when(5, lambda: (_longer(source / "optimizer.pt"), (source / "new.txt").touch()), monkeypatch)
        model_free_ptq(source, tmp_path / "out", "nvfp4a16")
        assert not (tmp_path / "out" / "new.txt").exists()

    def test_by_hash(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Inodes and times may change; not a single bit may."""
        with monkeypatch.context() as patch:
            when(5, lambda: _replaced(source / SHARD), patch)
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", hash_source=True)
        when(5, lambda: _in_secret(source / SHARD), monkeypatch)
        with pytest.raises(CheckpointError, match="changed while"):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", hash_source=True, overwrite=True)


class TestBetweenTwoRuns:
    @pytest.mark.parametrize("hashed", [False, True])
    @pytest.mark.parametrize("change", [_rewritten, change_last_byte, _in_secret, None])
    def test_it_starts_anew(
        self,
        source: Path,
        tmp_path: Path,
        change: Callable[[Path], None] | None,
        hashed: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            when(5, interrupt, patch)
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", hash_source=hashed)
        if change is not None:
            change(source / SHARD)
        report = model_free_ptq(source, tmp_path / "out", "nvfp4a16", hash_source=hashed)
        assert report.resumed == (5 if change is None else 0)
        model_free_ptq(source, tmp_path / "again", "nvfp4a16")
        for file in (tmp_path / "again").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


class TestCutShort:
    """Files that are cut short while they are mapped. Each case is a process of its own, which a SIGBUS would end."""

    CODE = """
import os, signal, sys, threading
from pathlib import Path
import torch
from amaxbridge.export.disk.mapped_file import MappedFile
how, path = sys.argv[1], Path(sys.argv[2])
path.write_bytes(bytes([1]) * (8 << 20))
file = os.open(path, os.O_RDONLY)
mapped = MappedFile(file, path.stat().st_size, path)
os.close(file)
view = mapped.look(0, 8 << 20)
os.truncate(path, 10_000)
if how == "torch":
    assert int(view.sum(dtype=torch.int64)) == 10_000
elif how == "many threads of torch":
    torch.set_num_threads(4)
    assert int(view.view(torch.int32).to(torch.int64).count_nonzero()) == 2_500
elif how == "numpy":
    assert int(view.numpy().sum(dtype="int64")) == 10_000
elif how == "bytes":
    assert sum(view.numpy().tobytes()) == 10_000
elif how == "several threads":
    threads = [threading.Thread(target=lambda: view.float().sum()) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
try:
    mapped.check()
except Exception as error:
    print(type(error).__name__, error)
del mapped, view
"""

    @pytest.mark.parametrize("how", ["torch", "many threads of torch", "numpy", "bytes", "several threads"])
    def test_by_whoever_reads(self, tmp_path: Path, how: str) -> None:
        command = [sys.executable, "-c", self.CODE, how, str(tmp_path / "file")]
        ended = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith(f"CheckpointError {tmp_path}/file became shorter while it was read")

    def test_faults_elsewhere_are_not_ours(self, tmp_path: Path) -> None:
        """A mapping that somebody else made ends the process as before, also while files of ours are mapped."""
        code = (
            "import mmap, os, sys\nfrom pathlib import Path\n"
            "from amaxbridge.export.disk.mapped_file import MappedFile\n"
            "path = Path(sys.argv[1]); path.write_bytes(bytes(1 << 20)); file = os.open(path, os.O_RDWR)\n"
            "ours = MappedFile(file, 1 << 20, path); theirs = mmap.mmap(file, 0); os.truncate(path, 0); theirs[99]\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "file")]
        assert subprocess.run(command, env=ENVIRONMENT, cwd=ROOT).returncode == -signal.SIGBUS

    def test_the_handler_goes_with_the_files(self, tmp_path: Path) -> None:
        code = """
import ctypes, signal, sys
from pathlib import Path
from amaxbridge.export.disk import mapped_file
def handler():
    now = mapped_file._SigAction()
    mapped_file._libc().sigaction(signal.SIGBUS, None, ctypes.byref(now))
    return now.handler
path = Path(sys.argv[1])
path.write_bytes(bytes(100))
before = handler()
with open(path, "rb") as file:
    mapped = [mapped_file.MappedFile(file.fileno(), 100, path) for _ in range(2)]
assert handler() != before
del mapped[0]
assert handler() != before
mapped.clear()
assert handler() == before
"""
        command = [sys.executable, "-c", code, str(tmp_path / "file")]
        assert subprocess.run(command, env=ENVIRONMENT, cwd=ROOT).returncode == 0

    @pytest.mark.parametrize("left", [0, 1000, 400_000])
    def test_after_the_header(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        """The header tells where the tensors lie in a file of the size that it had when it was opened."""
        path = tmp_path / "model.safetensors"
        save_file({"w": torch.ones(512, 512)}, path)

        def parse(data: bytes) -> dict[str, Any]:
            os.truncate(path, left)
            return parse_json_object(data)

        monkeypatch.setattr(safetensors_file, "parse_json_object", parse)
        with pytest.raises(CheckpointError, match=f"{path} cannot be read: .*copy the file again"):
            SafetensorsFile(path)

    def test_in_the_middle_of_a_run(self, tmp_path: Path) -> None:
        """Inside every tensor just when it is looked at; and at twenty moments, when the run may be through already."""
        torch.manual_seed(0)
        names = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(8)]
        tensors = {name: torch.randn(512, 2048).bfloat16() for name in names}
        source = write_checkpoint(tmp_path / "in", tensors, config={"architectures": ["Qwen3ForCausalLM"]})
        code = """
import os, sys, threading, time
from pathlib import Path
from amaxbridge.export.disk.mapped_file import MappedFile
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import CheckpointError
source, out = Path(sys.argv[1]), Path(sys.argv[2])
file = source / "model.safetensors"
whole = file.read_bytes()
look = MappedFile.look

def refused():
    try:
        model_free_ptq(source, out, "nvfp4a16", max_workers=2, overwrite=True)
    except CheckpointError:
        return True
    return False

def looks(cut=None):
    file.write_bytes(whole)
    places = []
    def counted(self, begin, nbytes):
        places.append(begin)
        if len(places) - 1 == cut:
            os.truncate(file, begin + nbytes // 2)
        return look(self, begin, nbytes)
    MappedFile.look = counted
    assert refused() == (cut is not None), cut
    MappedFile.look = look
    return len(places)

looked = looks()
assert looked >= 8, looked
for number in range(looked):
    looks(cut=number)

begin = time.monotonic()
file.write_bytes(whole)
assert not refused()
length = time.monotonic() - begin
for moment in range(20):
    file.write_bytes(whole)
    cut = threading.Timer(length * moment / 20, os.truncate, [file, len(whole) * moment // 20])
    cut.start()
    refused()
    cut.join()
print("done")
"""
        command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
        ended = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert ended.stdout == "done\n"


class TestFingerprint:
    def test_a_file_that_took_the_path_of_another(self, source: Path) -> None:
        """The swap is noticed when the file is opened again."""
        with SafetensorsFile(source / SHARD) as file:
            _rewritten(source / SHARD)
            _replaced(source / SHARD)
            file.close()
            stored = next(iter(file.tensors.values()))
            with pytest.raises(CheckpointError, match="changed while it was read"):
                stored.read()

    @pytest.mark.parametrize("hashed", [False, True])
    def test_all_that_changed_is_named(self, source: Path, hashed: bool) -> None:
        names = ["config.json", SHARD, "vocab/merges.txt", "tokenizer_config.json"]
        files = SourceFiles.of(source, names, hashed=hashed)
        files.check_unchanged()
        assert files.fingerprint == SourceFiles.of(source, names[::-1], hashed=hashed).fingerprint
        change_last_byte(source / SHARD)
        (source / "config.json").unlink()
        with pytest.raises(CheckpointError, match=rf"2 files changed .*\n  config\.json\n  {SHARD}\n"):
            files.check_unchanged()

    def test_another_converter_starts_anew(self) -> None:
        class Scaling:
            def __init__(self, block: int) -> None:
                self.block = block

        class Other(Scaling):
            pass

        described = {_described(each) for each in (Scaling(64), Scaling(64), Scaling(128), Other(64))}  # type: ignore[arg-type]
        assert len(described) == 3


def test_json_of_the_states_is_stable(source: Path) -> None:
    """Nothing in them depends on the process."""
    states = SourceFiles.of(source, ["config.json"]).states
    assert json.loads(json.dumps(states)) == {name: list(state) for name, state in states.items()}
