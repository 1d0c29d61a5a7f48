"""Where an output goes: links, mounts, directories that must stay, and names that belong to somebody else."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amaxbridge.export.disk.output_place import INSIDE, MARK, must_stay, resolved_output, staging_directory
from amaxbridge.export.disk.shard_layout import Layout, plan_layout
from amaxbridge.export.disk.staging import StagedDirectory, check_output
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import OutputExistsError, UsageError, WriteError
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.checkpoints import dense_model, write_checkpoint
from tests.support.paths import ENVIRONMENT, ROOT

MADE = ["README.md", "amaxbridge.json", "config.json", "model.safetensors", "tokenizer_config.json"]
OLD = {"config.json": "old", "model.safetensors": "old weights", "notes.txt": "mine"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "in", dense_model(1))


@pytest.fixture
def layout() -> Layout:
    return plan_layout({"w": TensorSpec((4,), torch.uint8)})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fill(directory: Path) -> None:
    directory.mkdir(parents=True)
    for name, content in OLD.items():
        (directory / name).write_text(content)


def is_old(directory: Path) -> bool:
    return {path.name: path.read_text() for path in directory.iterdir() if path.name != INSIDE} == OLD


class TestLinks:
    @pytest.mark.parametrize("there", ["no", "empty", "full"])
    def test_an_output_that_is_a_link_stays_one(self, source: Path, tmp_path: Path, there: str) -> None:
        """The directory behind the link is replaced as a whole; the link itself stays as it is."""
        real = tmp_path / "disk" / "model"
        real.parent.mkdir()
        if there == "empty":
            real.mkdir()
        if there == "full":
            fill(real)
        (tmp_path / "out").symlink_to(real)
        model_free_ptq(source, tmp_path / "out", "nvfp4a16", overwrite=there == "full")
        assert (tmp_path / "out").is_symlink()
        assert names(real) == MADE
        assert names(tmp_path) == ["disk", "out"]
        assert names(real.parent) == ["model"]

    def test_a_link_in_the_middle_and_one_to_a_link(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "one").symlink_to("disk")
        (tmp_path / "two").symlink_to("one")
        model_free_ptq(source, tmp_path / "two" / "model", "nvfp4a16")
        assert "config.json" in names(tmp_path / "disk" / "model")

    def test_links_in_a_circle(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(UsageError, match="Too many levels of symbolic links"):
            model_free_ptq(source, tmp_path / "a" / "out", "nvfp4a16")

    def test_a_link_to_the_source_is_the_source(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(source)
        with pytest.raises(UsageError, match="must not lie in one another"):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", overwrite=True)

    def test_it_is_resolved_once(self, tmp_path: Path, layout: Layout) -> None:
        """A link that is changed during the run does not move the output."""
        fill(tmp_path / "other")
        (tmp_path / "first").mkdir()
        (tmp_path / "out").symlink_to("first")
        with StagedDirectory(resolved_output(tmp_path / "out"), overwrite=False) as staged:
            staged.open(layout)
            (tmp_path / "out").unlink()
            (tmp_path / "out").symlink_to("other")
            staged.commit()
        assert is_old(tmp_path / "other")
        assert names(tmp_path / "first") == ["model.safetensors"]


class TestAppeared:
    """What appears at the output while it is made is never deleted without overwrite, and the work is kept."""

    @staticmethod
    def _directory(target: Path) -> None:
        fill(target)

    @staticmethod
    def _file(target: Path) -> None:
        target.write_text("a file")

    @staticmethod
    def _link(target: Path) -> None:
        fill(target.with_name("elsewhere"))
        target.symlink_to("elsewhere")

    @staticmethod
    def _dangling(target: Path) -> None:
        target.symlink_to("nowhere")

    @pytest.mark.parametrize("appears", [_directory, _file, _link, _dangling])
    def test_the_next_run_only_moves(
        self, source: Path, tmp_path: Path, appears: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target, finish = tmp_path / "out", StagedDirectory.commit

        def commit(staged: StagedDirectory) -> None:
            appears(target)
            finish(staged)

        with monkeypatch.context() as patch:
            patch.setattr(StagedDirectory, "commit", commit)
            with pytest.raises(OutputExistsError) as raised:
                model_free_ptq(source, target, "nvfp4a16")
        assert "is finished, and kept for" in "".join(raised.value.__notes__)
        assert os.path.lexists(target)
        made = (tmp_path / "out.partial" / "new" / "model.safetensors").stat()
        target.rename(tmp_path / "moved away")
        with monkeypatch.context() as patch:  # nothing is quantized or verified again
            patch.setattr("amaxbridge.export.output.finished_directory.verify", None)
            report = model_free_ptq(source, target, "nvfp4a16")
        assert report.resumed == report.bundles
        assert (target / "model.safetensors").stat().st_ino == made.st_ino
        assert (target / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
        assert "out.partial" not in names(tmp_path)
        assert os.path.lexists(tmp_path / "moved away")

    def test_with_overwrite_the_next_run_replaces_it(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = StagedDirectory.commit
        with monkeypatch.context() as patch:
            patch.setattr(StagedDirectory, "commit", lambda staged: (fill(staged.target), finish(staged)))
            with pytest.raises(OutputExistsError, match="overwrite=True"):
                model_free_ptq(source, tmp_path / "out", "nvfp4a16")
        with pytest.raises(OutputExistsError, match="exists and is not empty"):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16")
        assert is_old(tmp_path / "out")
        report = model_free_ptq(source, tmp_path / "out", "nvfp4a16", overwrite=True)
        assert report.resumed == report.bundles
        assert names(tmp_path) == ["out"]

    def test_in_a_directory_that_must_stay(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out, finish = tmp_path / "out", StagedDirectory.commit
        out.mkdir()
        monkeypatch.chdir(out)
        with monkeypatch.context() as patch:
            patch.setattr(StagedDirectory, "commit", lambda staged: ((out / "x").write_text("mine"), finish(staged)))
            with pytest.raises(OutputExistsError, match="overwrite=True"):
                model_free_ptq(source, ".", "nvfp4a16")
        assert names(out) == [INSIDE, "x"]
        (out / "x").unlink()
        assert model_free_ptq(source, ".", "nvfp4a16").resumed > 0
        assert names(out) == MADE


class TestItMustStay:
    def test_which_directories(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Mount points, the current directory and its parents must stay; a directory that does not exist need not."""
        (tmp_path / "a" / "b").mkdir(parents=True)
        assert must_stay(Path("/proc"))
        assert must_stay(Path("/"))
        assert not must_stay(tmp_path / "a")
        assert not must_stay(tmp_path / "none")
        monkeypatch.chdir(tmp_path / "a" / "b")
        assert must_stay(tmp_path / "a")
        assert staging_directory(tmp_path / "a") == tmp_path / "a" / INSIDE
        assert staging_directory(tmp_path / "c") == tmp_path / "c.partial"

    def test_its_files_are_replaced_one_by_one(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The directory stays the same one, `lost+found` included, and a message says so."""
        out = tmp_path / "out"
        fill(out)
        (out / "lost+found").mkdir()
        (out / "old directory").mkdir()
        before = out.stat().st_ino
        monkeypatch.chdir(out)
        caplog.set_level("INFO", "amaxbridge")
        model_free_ptq(source, out, "nvfp4a16", overwrite=True)
        assert out.stat().st_ino == before
        assert names(out) == sorted([*MADE, "lost+found"])
        assert names(tmp_path) == ["out"]
        assert "must stay, so the files will be moved into it one by one" in caplog.text

    def test_one_file_that_cannot_be_moved_undoes_the_others(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, rename = tmp_path / "out", os.rename
        fill(out)
        monkeypatch.chdir(out)

        def refusing(here: Path, there: Path) -> None:
            if Path(here).name == "notes.txt":
                raise PermissionError(13, "Permission denied", str(here))
            rename(here, there)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refusing)
            with pytest.raises(WriteError, match=r"notes\.txt: Permission denied; make it writable"):
                model_free_ptq(source, out, "nvfp4a16", overwrite=True)
        assert is_old(out)
        report = model_free_ptq(source, out, "nvfp4a16", overwrite=True)
        assert report.resumed == report.bundles

    def test_a_move_that_was_cut_short_is_finished_by_another_command(
        self, tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first command was allowed to overwrite, and half of the old files are gone."""
        out, rename, moved = tmp_path / "out", os.rename, 0
        fill(out)
        monkeypatch.chdir(out)

        def dying(here: Path, there: Path) -> None:
            nonlocal moved
            moved += 1
            if moved > 2:
                raise KeyboardInterrupt  # nothing is undone, as after a kill
            rename(here, there)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "rename", dying)
            with StagedDirectory(out, "a plan") as staged:
                staged.open(layout)
                staged.commit()
        assert "config.json" not in names(out)
        check_output(out, overwrite=False)
        with pytest.raises(OutputExistsError), StagedDirectory(out, "another plan", overwrite=False) as staged:
            staged.open(layout)
        assert names(out) == ["model.safetensors"]

    def test_a_real_mount(self, source: Path, tmp_path: Path) -> None:
        """A bind mount, as of `docker run -v`, where this machine lets a process make one; else its refusal is seen."""
        for name in ("disk", "out"):
            (tmp_path / name).mkdir()
        code = (
            f"mount --bind {tmp_path}/disk {tmp_path}/out && exec {sys.executable} -c 'import sys; "
            "from amaxbridge.export.model_free.whole_directory import model_free_ptq as f; "
            f'f(sys.argv[1], sys.argv[2], "nvfp4a16")\' {source} {tmp_path}/out'
        )
        ended = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", code],
            env=ENVIRONMENT,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if ended.returncode == 0:
            assert names(tmp_path / "disk") == MADE
        else:
            assert re.match(r"(unshare|mount): ", ended.stderr), ended.stderr
        assert names(tmp_path) == ["disk", "out"]
        assert names(tmp_path / "out") == []


class TestNamesOfOthers:
    """A directory or file of the user's that has a name of ours is refused by name, or simply left alone."""

    @pytest.mark.parametrize("what", ["directory", "file", "link", "dangling"])
    @pytest.mark.parametrize("overwrite", [True, False])
    def test_the_staging_directory(self, source: Path, tmp_path: Path, what: str, overwrite: bool) -> None:
        partial, theirs = tmp_path / "out.partial", tmp_path / "theirs"
        fill(theirs)
        if what == "directory":
            fill(partial)
        elif what == "file":
            partial.write_text("mine")
        else:
            partial.symlink_to(theirs if what == "link" else "nowhere")
        before = names(tmp_path)
        with pytest.raises(OutputExistsError, match=r"out\.partial has the name .* move it away, or choose another"):
            model_free_ptq(source, tmp_path / "out", "nvfp4a16", overwrite=overwrite)
        assert names(tmp_path) == before
        assert is_old(theirs)
        assert what != "directory" or is_old(partial)

    def test_that_look_like_a_plan_of_ours(self, tmp_path: Path, layout: Layout) -> None:
        """Without our mark the directory is not ours, whatever else it holds."""
        partial = tmp_path / "out.partial"
        fill(partial)
        for name in (".plan", ".complete", ".done-0-of-1"):
            (partial / name).write_text("plan")
        with pytest.raises(OutputExistsError, match=f"it has no {re.escape(MARK)}"):
            StagedDirectory(tmp_path / "out", "plan").open(layout)
        assert len(names(partial)) == 6

    @pytest.mark.parametrize("name", ["out.previous", "out.partial.lock", "out.new", "previous"])
    @pytest.mark.parametrize("there", [True, False])
    def test_names_beside_the_output(self, source: Path, tmp_path: Path, name: str, there: bool) -> None:
        fill(tmp_path / name)
        if there:
            fill(tmp_path / "out")
        model_free_ptq(source, tmp_path / "out", "nvfp4a16", overwrite=True)
        assert is_old(tmp_path / name)
        assert names(tmp_path) == sorted([name, "out"])

    def test_an_empty_directory_is_nobodys(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out.partial").mkdir()
        model_free_ptq(source, tmp_path / "out", "nvfp4a16")
        assert names(tmp_path) == ["out"]

    def test_beside_a_file_of_process_file(self, source: Path, tmp_path: Path) -> None:
        from amaxbridge.export.model_free.per_file import process_file

        fill(tmp_path / "model.safetensors.partial")
        with pytest.raises(OutputExistsError, match="has the name"):
            process_file({str(source / "model.safetensors"): None}, tmp_path / "model.safetensors", "nvfp4a16")
        assert is_old(tmp_path / "model.safetensors.partial")
