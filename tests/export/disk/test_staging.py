"""The staging directory: who owns it, what a later run trusts in it, and that its locks are released."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amaxbridge.export.disk.output_place import MARK
from amaxbridge.export.disk.shard_layout import Layout, plan_layout
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.disk.staging import Share, StagedDirectory
from amaxbridge.mappings.errors import CheckpointError, OutputExistsError, UsageError, WriteError
from amaxbridge.mappings.tensors import TensorSpec

PLAN = "a plan"


@pytest.fixture
def layout() -> Layout:
    return plan_layout({f"w{index}": TensorSpec((64,), torch.uint8) for index in range(3)}, max_shard_bytes=64)


def write_all(staged: StagedDirectory, layout: Layout, value: int) -> None:
    writer = ShardWriter(staged.path, layout, staged)
    for name in layout.places:
        writer.write(name, torch.full((64,), value, dtype=torch.uint8))
        writer.done(name)
    writer.close()


def values(directory: Path) -> set[int]:
    return {file.read_bytes()[-1] for file in directory.glob("*.safetensors")}


def ends_soon(work: Callable[[], object]) -> None:
    """Runs the work, and fails if it waits for a lock that nobody releases."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(300)  # on a busy machine
    assert not thread.is_alive(), "it hangs"


class TestStillMine:
    """Another run has removed the directory and made it anew: the first stops, the second is unharmed."""

    @pytest.fixture
    def two(self, tmp_path: Path, layout: Layout) -> tuple[StagedDirectory, StagedDirectory]:
        first = StagedDirectory(tmp_path / "out", PLAN)
        first.open(layout)
        shutil.rmtree(first.root)
        second = StagedDirectory(tmp_path / "out", PLAN)
        assert second.open(layout) == frozenset()
        return first, second

    def ends_well(self, second: StagedDirectory, layout: Layout) -> None:
        with second:
            write_all(second, layout, 2)
            second.commit()
        assert values(second.target) == {2}
        assert [path.name for path in second.target.parent.iterdir()] == ["out"]

    def test_at_the_next_write(self, two: tuple[StagedDirectory, StagedDirectory], layout: Layout) -> None:
        first, second = two
        with pytest.raises(WriteError, match="removed or made anew by another run"), first:
            write_all(first, layout, 1)
        self.ends_well(second, layout)

    def test_at_a_write_to_files_that_were_open(self, tmp_path: Path, layout: Layout) -> None:
        first, second = (StagedDirectory(tmp_path / "out", PLAN) for _ in range(2))
        with pytest.raises(WriteError, match="made anew"), first:
            first.open(layout)
            writer = ShardWriter(first.path, layout, first)
            for name in layout.places:
                writer.write(name, torch.full((64,), 1, dtype=torch.uint8))
                writer.done(name)
            shutil.rmtree(first.root)
            second.open(layout)
            writer.close()  # notes what is done where nobody reads it
            assert second.journal.read_bytes() == b""
            first.check_mine()
        self.ends_well(second, layout)

    @pytest.mark.parametrize("step", ["write_file", "commit"])
    def test_at_the_end(self, two: tuple[StagedDirectory, StagedDirectory], layout: Layout, step: str) -> None:
        first, second = two
        with pytest.raises(WriteError, match="made anew"), first:
            first.write_file("config.json", b"{}") if step == "write_file" else first.commit()
        assert not second.target.exists()
        self.ends_well(second, layout)

    def test_it_is_gone_altogether(self, tmp_path: Path, layout: Layout) -> None:
        with pytest.raises(WriteError, match="was removed"), StagedDirectory(tmp_path / "out", PLAN) as staged:
            staged.open(layout)
            shutil.rmtree(staged.root)
            staged.commit()
        assert list(tmp_path.iterdir()) == []

    def test_a_rank_that_joined_is_asked_too(self, tmp_path: Path, layout: Layout) -> None:
        first, other = StagedDirectory(tmp_path / "out"), StagedDirectory(tmp_path / "out")
        first.open(layout)
        other.join(first.root)
        write_all(other, layout, 1)
        shutil.rmtree(first.root)
        with pytest.raises(WriteError, match="removed"), other:
            write_all(other, layout, 2)


class TestLocksAreGivenBack:
    @pytest.mark.parametrize("line", [b"{\n", b"\xff\xfe\n", b"[1]\n", b"null\n", b"\n", b'"w0"x\n', b"\0\0\0\0\n"])
    def test_a_damaged_line_of_a_journal(self, tmp_path: Path, layout: Layout, line: bytes) -> None:
        """The bundle of that line is made again; all others count as done, in this process and in the next."""
        for last in (False, True):
            with StagedDirectory(tmp_path / "out", PLAN) as staged:
                done = staged.open(layout)
                assert done == (frozenset({"w0", "w2"}) if last else frozenset())
                assert staged.left(list(layout.places)) == (1 if last else 3)
                staged.journal.write_bytes(b'"w0"\n' + line + b'"w2"\n')

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, WriteError, CheckpointError, ZeroDivisionError])
    @pytest.mark.parametrize("step", ["open", "left", "complete", "commit"])
    def test_any_error_at_any_step(
        self, tmp_path: Path, layout: Layout, step: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inside = {"open": "_is_whole", "left": "_done", "complete": "check_mine", "commit": "_move"}[step]

        def run() -> None:
            with StagedDirectory(tmp_path / "out", PLAN) as staged:
                staged.open(layout)
                write_all(staged, layout, 1)
                assert staged.left(list(layout.places)) == 0
                staged.commit()

        if step == "open":
            with pytest.raises(KeyboardInterrupt), StagedDirectory(tmp_path / "out", PLAN) as staged:
                staged.open(layout)
                write_all(staged, layout, 1)
                raise KeyboardInterrupt

        def failing(*_: object) -> None:
            raise error

        monkeypatch.setattr(StagedDirectory, inside, failing)
        with pytest.raises((error, WriteError)):
            run()
        monkeypatch.undo()
        ends_soon(run)
        assert values(tmp_path / "out") == {1}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_of_a_run_that_is_refused(self, tmp_path: Path, layout: Layout) -> None:
        with StagedDirectory(tmp_path / "out", PLAN, Share(0, 2)) as first:
            first.open(layout)
            for other in (Share(0, 2), Share(0, 3), Share(0, 1)):
                with pytest.raises(OutputExistsError), StagedDirectory(tmp_path / "out", PLAN, other) as refused:
                    refused.open(layout)
            second = StagedDirectory(tmp_path / "out", PLAN, Share(1, 2))
            ends_soon(lambda: second.open(layout))


class TestShards:
    """A later run looks at the shards before it trusts the journals."""

    @pytest.fixture
    def kept(self, tmp_path: Path, layout: Layout) -> StagedDirectory:
        with pytest.raises(KeyboardInterrupt), StagedDirectory(tmp_path / "out", PLAN) as staged:
            staged.open(layout)
            write_all(staged, layout, 1)
            raise KeyboardInterrupt
        return StagedDirectory(tmp_path / "out", PLAN)

    def test_whole_ones_are_continued(self, kept: StagedDirectory, layout: Layout) -> None:
        assert kept.open(layout) == frozenset(layout.places)

    @pytest.mark.parametrize(
        "damage", ["missing", "short", "empty", "long", "header", "directory", "all", "link", "all by a link"]
    )
    def test_a_damaged_one_is_made_anew(
        self, kept: StagedDirectory, layout: Layout, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = kept.path / layout.shards[1].file_name
        size = file.stat().st_size
        if damage == "missing":
            file.unlink()
        elif damage == "directory":
            file.unlink()
            file.mkdir()
        elif damage == "all":
            shutil.rmtree(kept.path)
        elif damage in ("link", "all by a link"):
            moved = kept.path if "all" in damage else file
            moved.rename(tmp_path / "elsewhere")
            moved.symlink_to(tmp_path / "elsewhere")
        elif damage == "header":
            with open(file, "r+b") as opened:
                opened.write(b"\0" * 16)
        else:
            os.truncate(file, {"short": size - 1, "empty": 0, "long": size + 1}[damage])
        with kept:
            assert kept.open(layout) == frozenset()
            assert layout.shards[1].file_name in caplog.text
            write_all(kept, layout, 2)
            kept.commit()
        assert values(kept.target) == {2}
        assert len(list(kept.target.iterdir())) == 3
        assert not any(path.is_symlink() for path in (kept.target, *kept.target.iterdir()))

    @pytest.mark.parametrize("name", [".done-0-of-1", ".plan", ".complete", ".amaxbridge.lock", "new/sub"])
    @pytest.mark.parametrize("exists", [False, True])
    def test_nothing_is_written_through_a_link(
        self, kept: StagedDirectory, layout: Layout, tmp_path: Path, name: str, exists: bool
    ) -> None:
        """One of the names in the staging directory leads to a file, or a directory, of the user's."""
        mine, place = tmp_path / "mine", kept.root / name
        if exists and name == "new/sub":
            mine.mkdir()
        elif exists:
            mine.write_text("mine")
        before = sorted(mine.iterdir()) if mine.is_dir() else exists
        place.unlink(missing_ok=True)
        place.symlink_to(mine)
        with contextlib.suppress(WriteError, UsageError), kept:
            kept.open(layout)
            write_all(kept, layout, 2)
            kept.write_file("sub/notes.txt", b"carried")
            kept.commit()
            assert (kept.target / "sub" / "notes.txt").read_bytes() == b"carried"
        assert (sorted(mine.iterdir()) if mine.is_dir() else mine.exists()) == before
        assert not mine.is_file() or mine.read_text() == "mine"

    @pytest.mark.parametrize("complete", [False, True])
    def test_a_link_in_the_place_of_the_output_is_not_moved(
        self, kept: StagedDirectory, layout: Layout, tmp_path: Path, complete: bool
    ) -> None:
        """Between the last write and the move. Moved, it would lead nowhere once the staging directory is removed."""
        with pytest.raises(WriteError, match="was replaced by another program"), kept:
            kept.open(layout)
            write_all(kept, layout, 2)
            if complete:
                (kept.root / ".complete").write_text(str(kept.path.stat().st_ino))
            kept.path.rename(tmp_path / "elsewhere")
            kept.path.symlink_to(tmp_path / "elsewhere")
            kept.commit()
        assert not os.path.lexists(kept.target)

    def test_under_the_hands_of_others(self, tmp_path: Path, layout: Layout) -> None:
        """While another process writes, nothing is cleared: the run is refused."""
        with StagedDirectory(tmp_path / "out", PLAN, Share(0, 2)) as first:
            first.open(layout)
            (first.path / layout.shards[0].file_name).unlink()
            with pytest.raises(WriteError, match=r"lacks model-00001.* while other processes write there"):
                StagedDirectory(tmp_path / "out", PLAN, Share(1, 2)).open(layout)

    def test_another_plan_or_an_old_replacement_is_cleared(self, kept: StagedDirectory, layout: Layout) -> None:
        """An exchange leaves the old output in the staging directory: it is not the finished one, whatever its name."""
        with kept:
            kept.open(layout)
            kept.commit()
        (kept.target / "old").touch()
        again = StagedDirectory(kept.target, PLAN)
        again.open(layout)
        write_all(again, layout, 3)
        (again.root / ".complete").write_text(str(again.path.stat().st_ino))
        again.path.rename(again.root / "elsewhere")
        shutil.copytree(kept.target, again.path)  # killed after the exchange: another inode
        assert not again.is_complete
        again._close()
        with StagedDirectory(kept.target, "another plan") as staged:
            assert staged.open(layout) == frozenset()
            write_all(staged, layout, 4)
            staged.commit()
        assert values(kept.target) == {4}
        assert not (kept.target / "old").exists()


def test_what_is_in_it(tmp_path: Path, layout: Layout) -> None:
    """It holds what its module says, and nothing of that reaches the output."""
    with StagedDirectory(tmp_path / "out", PLAN) as staged:
        staged.open(layout)
        write_all(staged, layout, 1)
        staged.write_file("sub/deep/notes.txt", b"carried")
        assert {path.name for path in staged.root.iterdir()} == {MARK, ".plan", ".done-0-of-1", "new"}
        assert [json.loads(line) for line in staged.journal.read_text().splitlines()] == ["w0", "w1", "w2"]
        staged.commit()
    assert len(list((tmp_path / "out").iterdir())) == 4
