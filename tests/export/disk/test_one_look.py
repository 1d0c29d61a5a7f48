"""A file that changes between two looks of one reader: each reader looks once, or says so in one error.

The interleavings are made on purpose: another program's act runs inside of a call that the reader makes.
"""

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from amaxbridge.export import model_free_ptq
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.amax.quant_state_file import ModelIdentity, quant_state_bytes, read_quant_state
from amaxbridge.export.disk import input_files
from amaxbridge.export.disk.input_files import open_input, parts_of, read_input
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.export.disk.strict_json import read_json_object
from amaxbridge.export.model_free.per_file import process_file
from amaxbridge.export.output.config_and_index import Companions
from amaxbridge.export.report import write_report
from amaxbridge.export.runtime import load_linear
from amaxbridge.export.verify import verify
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.mappings.errors import CheckpointError
from tests.support.checkpoints import change_last_byte, dense_model, write_checkpoint

CONFIG = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 256}


@contextmanager
def meanwhile(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object]) -> Iterator[None]:
    """Acts once, just before the first call of a function."""
    real, left = getattr(owner, name), [act]

    def called(*arguments: Any, **named: Any) -> Any:
        if left:
            left.pop()()
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, called)
        yield
    assert not left, f"{name} was never called"


def ends_soon(work: Callable[[], object]) -> None:
    """Fails where the work waits for somebody to write into a pipe."""
    problems = list[BaseException]()

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=caught, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    if problems:
        raise problems[0]


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def a_link_out(file: Path) -> None:
    outside = file.parent.parent / "outside"
    shutil.copy(file, outside)
    file.unlink()
    file.symlink_to(outside)


def nothing(file: Path) -> None:
    file.unlink()


BECOMES = [a_pipe, a_directory, a_circle, a_link_out, nothing]


class TestAnInputFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        (tmp_path / "in").mkdir()
        made = tmp_path / "in" / "config.json"
        made.write_text('{"a": 1}')
        return made

    @pytest.mark.parametrize("becomes", BECOMES)
    def test_before_it_is_opened(self, file: Path, becomes: Callable[[Path], None]) -> None:
        becomes(file)
        if becomes is nothing:
            assert read_input(file, file.parent) is None
            return
        with pytest.raises(CheckpointError, match=str(file)):
            ends_soon(lambda: read_input(file, file.parent))

    @pytest.mark.parametrize("becomes", BECOMES)
    def test_between_the_look_at_links_and_the_open(
        self, file: Path, becomes: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with meanwhile(monkeypatch, os, "open", lambda: becomes(file)):
            if becomes is nothing:
                assert read_json_object(file) is None
                return
            with pytest.raises(CheckpointError, match=str(file)):
                ends_soon(lambda: read_json_object(file))

    def test_a_socket_and_a_device(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file.unlink()
        monkeypatch.chdir(file.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
            with pytest.raises(CheckpointError, match="cannot be read"):
                read_input(file)
        with pytest.raises(CheckpointError, match="it is a device, not a file"):
            read_input(Path("/dev/zero"))

    @pytest.mark.parametrize("size", [0, 3, 8, 9, 100])
    def test_while_it_is_read(self, file: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut short, made longer, or written anew at the same length."""
        times = file.stat()

        def change() -> None:
            file.write_bytes(b"x" * size)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))

        with (
            meanwhile(monkeypatch, os, "read", change),
            pytest.raises(CheckpointError, match=f"{file} changed while it was read"),
        ):
            read_input(file)

    def test_no_more_than_a_small_file_has(self, file: Path) -> None:
        """A file may be longer than any memory, and take no room on the disk."""
        os.truncate(file, 1 << 42)
        with pytest.raises(CheckpointError, match=r"has 4,398,046,511,104 bytes, more than any such file has"):
            read_input(file)

    def test_in_parts(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(input_files, "_PART", 3)
        assert list(parts_of(file)) == [b'{"a', b'": ', b"1}"]

    def test_nothing_stays_open(self, file: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for becomes in BECOMES[1:]:
            file.parent.mkdir(exist_ok=True)
            with file.open("w") as opened:
                opened.write("{}")
            becomes(file)
            for reader in (read_input, open_input):
                if becomes is not nothing or reader is open_input:
                    with pytest.raises(CheckpointError):
                        reader(file, file.parent)
            if file.is_dir():
                file.rmdir()
            file.unlink(missing_ok=True)
        assert len(os.listdir("/proc/self/fd")) == before


class TestDirectories:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        tensors = dense_model(1)
        cut = list(tensors)[len(tensors) // 2]
        return write_checkpoint(tmp_path / "in", tensors, cuts=[cut], config=CONFIG)

    @pytest.fixture
    def quantized(self, source: Path, tmp_path: Path) -> Path:
        model_free_ptq(source, tmp_path / "quantized", "fp8_dynamic")
        return tmp_path / "quantized"

    @staticmethod
    def touched(file: Path) -> None:
        """Other bytes of the same length."""
        change_last_byte(file)
        found = file.stat()
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))

    @pytest.mark.parametrize("becomes", BECOMES)
    @pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "tokenizer_config.json"])
    def test_quantize_after_the_files_were_listed(
        self, source: Path, tmp_path: Path, name: str, becomes: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with (
            meanwhile(monkeypatch, SourceFiles, "of", lambda: becomes(source / name)),
            pytest.raises(Exception, match=name) as raised,
        ):
            ends_soon(lambda: model_free_ptq(source, tmp_path / "out", "fp8_dynamic"))
        assert raised.type.__module__ == "amaxbridge.mappings.errors"
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize("name", ["hf_quant_config.json", "model.safetensors.index.json", "README.md"])
    def test_quantize_what_appears_after_it_was_absent(
        self, source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would be read, and the next run would read something else."""
        (source / "model.safetensors.index.json").unlink()
        parts = SafetensorsFile(source / "model-00001-of-00002.safetensors").tensors
        save_file({name: each.read() for name, each in parts.items()}, source / "model.safetensors")
        for number in (1, 2):
            (source / f"model-0000{number}-of-00002.safetensors").unlink()
        weight_map = {"weight_map": dict.fromkeys(parts, "model.safetensors")}
        contents = {"README.md": "# x", "model.safetensors.index.json": json.dumps(weight_map)}
        with (
            meanwhile(
                monkeypatch,
                SafetensorsCheckpoint,
                "__init__",
                lambda: (source / name).write_text(contents.get(name, "{}")),
            ),
            pytest.raises(CheckpointError, match=f"1 files changed while they were read.*\n  {name}"),
        ):
            model_free_ptq(source, tmp_path / "out", "fp8_dynamic", architecture="guess")
        assert not (tmp_path / "out").exists()

    def test_a_change_within_a_tick_of_the_clock(self, source: Path) -> None:
        """The kernel's clock for times of files stands still for some milliseconds."""
        file = source / "config.json"
        for _ in range(20):
            file.write_text('{"a": 1}')
            files = SourceFiles.of(source, ["config.json"])
            file.write_text('{"a": 2}')
            with pytest.raises(CheckpointError, match="changed"):
                files.check_unchanged()

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"]
    )
    def test_verify(self, quantized: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def change() -> None:
            if name.endswith(".json"):
                content = json.loads((quantized / name).read_text())
                (quantized / name).write_text(json.dumps({**content, "another": 1}))
            else:
                self.touched(quantized / name)

        real = CheckpointView.__init__

        def opened(view: CheckpointView, directory: Path) -> None:
            real(view, directory)
            change()

        monkeypatch.setattr(CheckpointView, "__init__", opened)
        with pytest.raises(CheckpointError, match="changed while"):
            verify(quantized)

    def test_verify_against_a_directory(self, source: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = source / "model-00001-of-00002.safetensors"
        with (
            meanwhile(monkeypatch, SafetensorsCheckpoint, "check_unchanged", lambda: self.touched(file)),
            pytest.raises(CheckpointError, match=f"{file} changed while it was read"),
        ):
            verify(quantized, reference=source)

    def test_a_new_version_takes_the_place_of_the_old(
        self, source: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An export moves its output into place while `verify`, `report` and the runtime read there."""
        new = tmp_path / "new"
        shutil.copytree(quantized, new)
        (new / "config.json").write_text((quantized / "config.json").read_text() + "\n")
        self.touched(new / "model-00001-of-00002.safetensors")

        def exchange() -> None:
            quantized.rename(tmp_path / "old")
            new.rename(quantized)
            (tmp_path / "old").rename(new)

        readers: list[Callable[[], object]] = [
            lambda: verify(quantized),
            lambda: write_report(quantized),
            lambda: load_linear(quantized, "model.layers.0.self_attn.qkv_proj"),
        ]
        seen = 0
        for read in readers:
            opened, count = SafetensorsFile.__post_init__, 0

            def second(file: SafetensorsFile) -> None:
                nonlocal count, seen
                count += 1
                if count == 2:
                    exchange()
                    seen += 1
                opened(file)  # noqa: B023

            with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="changed while"):
                patch.setattr(SafetensorsFile, "__post_init__", second)
                read()
        assert seen == len(readers)

    def test_process_file(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = source / "model-00002-of-00002.safetensors"
        with (
            meanwhile(monkeypatch, SafetensorsFile, "check_unchanged", lambda: self.touched(file)),
            pytest.raises(CheckpointError, match=f"{file} changed while it was read"),
        ):
            process_file({str(file): None}, tmp_path / "made.safetensors", "fp8_dynamic")
        assert not (tmp_path / "made.safetensors").exists()

    def test_quantizer_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = QuantState({"m.weight_quantizer._amax": torch.tensor(1.0)}, {"m": "nvfp4"})
        file = tmp_path / "state.safetensors"
        file.write_bytes(quant_state_bytes(state, ModelIdentity.of(CONFIG)))
        assert read_quant_state(file, CONFIG).formats == state.formats
        with (
            meanwhile(monkeypatch, SafetensorsFile, "read", lambda: self.touched(file)),
            pytest.raises(CheckpointError, match="changed while it was read"),
        ):
            read_quant_state(file, CONFIG)

    @pytest.mark.parametrize("becomes", [a_pipe, a_circle, a_link_out, nothing])
    def test_files_that_are_carried(self, source: Path, becomes: Callable[[Path], None]) -> None:
        companions = Companions.of(source)
        becomes(source / "tokenizer_config.json")
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            ends_soon(lambda: [list(parts) for _, parts in companions.contents()])

    def test_a_card_that_leads_out_is_not_taken(self, source: Path) -> None:
        (source / "README.md").write_text("# mine")
        companions = Companions.of(source)
        assert companions.card == "# mine"
        a_link_out(source / "README.md")
        with pytest.raises(CheckpointError, match="outside of"):
            _ = companions.card
        assert Companions.of(source).card == ""
