"""Megatron checkpoints read in one process, without Megatron: the bytes of the live export, and clear refusals."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorProperties

from amaxbridge.bridge import export_checkpoint
from amaxbridge.bridge.stored.saved_arguments import read_arguments
from amaxbridge.bridge.stored.stored_model import StoredModel
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint, Region
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.mappings.errors import CheckpointError
from tests.support.comparing import same_files
from tests.support.launcher import LiveRanks
from tests.support.live_checkpoints import SCHEMES, convert
from tests.support.paths import ENVIRONMENT, ROOT


@pytest.mark.parametrize("form", SCHEMES)
def test_saved_at_tp_2_pp_2(dense: LiveRanks, tmp_path: Path, form: str) -> None:
    """One tensor holds all layers in order; per-channel amax lie rank by rank."""
    saved = dense.at(tp=2, pp=2)
    convert(dense, saved / form, tmp_path / "out", SCHEMES[form])
    same_files(tmp_path / "out", saved / f"live_{form}")


@pytest.mark.parametrize("form", ["plain", "nvfp4"])
def test_saved_at_ep_2(moe: LiveRanks, tmp_path: Path, form: str) -> None:
    """One tensor holds all experts, or each expert has its own."""
    saved = moe.at(processes=2, tp=1, ep=2)
    convert(moe, saved / form, tmp_path / "out", SCHEMES[form])
    same_files(tmp_path / "out", saved / f"live_{form}")


@pytest.mark.parametrize("form", SCHEMES)
def test_experts_saved_at_etp_2(moe: LiveRanks, tmp_path: Path, form: str) -> None:
    """Per-channel amax of an expert lie rank by rank, too."""
    saved = moe.at(tp=2, pp=1)
    convert(moe, saved / form, tmp_path / "out", SCHEMES[form])
    same_files(tmp_path / "out", saved / f"live_{form}")


def test_without_megatron_and_modelopt(dense: LiveRanks, tmp_path: Path) -> None:
    """Neither package can be imported."""
    saved = dense.at(tp=2, pp=2)
    words = [f"checkpoint={saved / 'nvfp4'}", f"hf={dense.hf}", f"output={tmp_path / 'out'}", "io.max_shard_gb=6e-5"]
    code = (
        "import sys\n"
        "for name in ('megatron', 'modelopt'): sys.modules[name] = None\n"
        f"sys.argv[1:] = {words}\n"
        "from amaxbridge import cli\n"
        "from amaxbridge.scripts import export\n"
        "cli.run('export', export.export)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, check=True)
    same_files(tmp_path / "out", saved / "live_nvfp4")


def test_experts_and_layers_in_one_tensor(tmp_path: Path) -> None:
    """The same holds for amax: weight quantizers have one for each expert, input quantizers one for all."""
    weight, amax = torch.randn(2, 4, 6, 8), torch.rand(2, 4)
    module = "decoder.layers.mlp.experts.experts.linear_fc1"
    state = {
        f"{module}.weight": weight,
        f"{module}.weight_quantizer._amax": amax,
        f"{module}.input_quantizer._amax": torch.rand(2, 1),
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.rand(3),
    }
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    stored = StoredModel(DistCheckpoint(tmp_path))
    experts = "decoder.layers.1.mlp.experts.linear_fc1"
    assert torch.equal(stored[f"{experts}.weight3"], weight[1, 3])
    assert torch.equal(stored[f"{experts}.weight_quantizer.3._amax"], amax[1, 3])
    assert len(stored) == 2 * (4 + 4 + 1)
    with pytest.raises(CheckpointError, match="amax without a quantizer configuration"):
        stored.quantizers()


def test_metadata_of_a_newer_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.15 pickles one thing more of each tensor than 2.14, its strides; another release may again."""
    torch.manual_seed(3)
    state = {"decoder.final_layernorm.weight": torch.randn(8), "embedding.word_embeddings.weight": torch.randn(4, 8)}
    fewer = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*fewer(self), (8, 1)))
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    monkeypatch.undo()
    opened = DistCheckpoint(tmp_path)
    read = dict(zip(state, opened.read([Region(name) for name in state]), strict=True))
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


class TestDamage:
    """One clear error, before anything is written."""

    @pytest.fixture
    def saved(self, dense: LiveRanks, tmp_path: Path) -> Path:
        shutil.copytree(dense.at(tp=2, pp=2) / "nvfp4", tmp_path / "saved")
        return tmp_path / "saved" / "iter_0000007"

    def refuse(self, dense: LiveRanks, saved: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            convert(dense, saved.parent, saved.parent.parent / "out", "nvfp4")
        assert not list(saved.parent.parent.glob("out*"))
        return str(error.value)

    def test_a_truncated_file(self, dense: LiveRanks, saved: Path) -> None:
        os.truncate(saved / "__2_0.distcp", 100)
        assert "__2_0.distcp: truncated, 100 of at least" in self.refuse(dense, saved)

    def test_a_missing_file(self, dense: LiveRanks, saved: Path) -> None:
        (saved / "__1_0.distcp").unlink()
        assert "__1_0.distcp: missing" in self.refuse(dense, saved)

    def test_a_file_of_other_bytes(self, dense: LiveRanks, saved: Path) -> None:
        for file in saved.glob("*.distcp"):
            file.write_bytes(bytes(file.stat().st_size))
        self.refuse(dense, saved)

    def test_metadata_that_runs_code(self, dense: LiveRanks, saved: Path) -> None:
        class Attack:
            def __reduce__(self) -> object:
                return (os.system, ("true",))

        (saved / ".metadata").write_bytes(pickle.dumps(Attack()))
        assert "posix.system" in self.refuse(dense, saved)

    def test_metadata_that_names_a_function(self, dense: LiveRanks, saved: Path) -> None:
        """The function lies in a module whose classes are allowed."""
        (saved / ".metadata").write_bytes(b"ctorch.distributed.checkpoint.planner\nreduce\n.")
        assert "it names torch.distributed.checkpoint.planner.reduce" in self.refuse(dense, saved)

    def test_no_iteration(self, dense: LiveRanks, saved: Path) -> None:
        (saved.parent / "latest_checkpointed_iteration.txt").write_text("8")
        assert "iter_0000008 is not a checkpoint of Megatron's training" in self.refuse(dense, saved)


PICKLES_OF_TENSORS = {
    "a key that doubles": b"\x80\x02}qc)qa" + b"haha\x86qa" * 40 + b"hchaNs",
    "an OrderedDict of such keys": b"\x80\x02)qa" + b"haha\x86qa" * 10 + b"ccollections\nOrderedDict\n](haNe\x85\x85R",
    "another class": b"\x80\x02ccollections\nCounter\n)R",
    "a storage of such a name": b"\x80\x02)qa" + b"haha\x86qa" * 40 + b"(hahahahahatQ",
}


class TestHostile:
    """What a small checkpoint may not do: take memory that it does not have, wait, or lead elsewhere."""

    NAME = "embedding.word_embeddings.weight"

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        (tmp_path / "saved").mkdir()
        save({self.NAME: torch.ones(4, 8)}, storage_writer=FileSystemWriter(tmp_path / "saved"), no_dist=True)
        return tmp_path / "saved"

    def rewrite(self, saved: Path, change: Callable[[Metadata], None]) -> None:
        metadata = pickle.loads((saved / ".metadata").read_bytes())
        change(metadata)
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))

    def refuse(self, saved: Path, match: str, *, index: tuple[int, ...] = ()) -> None:
        with pytest.raises(CheckpointError, match=match):
            DistCheckpoint(saved).read([Region(self.NAME, index)])

    def repack(self, saved: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
        """Writes the archive of the tensor again, each member as `change` makes it from its name and content."""
        (file,) = saved.glob("*.distcp")
        made, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(file.read_bytes()))
        with zipfile.ZipFile(made, "w", compression) as archive:
            for each in source.infolist():
                archive.writestr(each.filename, change(each.filename, source.read(each)))
        file.write_bytes(made.getvalue())

        def whole(metadata: Metadata) -> None:
            for index, place in metadata.storage_data.items():
                metadata.storage_data[index] = replace(place, offset=0, length=len(made.getvalue()))

        self.rewrite(saved, whole)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    def test_a_packed_tensor(self, saved: Path, compression: int) -> None:
        """32 MB of zeros in 32 kB; a larger one would fill any memory."""
        self.repack(saved, lambda name, content: bytes(32 << 20) if "/data/" in name else content, compression)
        self.refuse(saved, "unpack to 33,.* torch.save does not pack")

    @pytest.mark.parametrize("what", PICKLES_OF_TENSORS)
    def test_a_pickle_that_keeps_torch_busy(self, saved: Path, what: str) -> None:
        """PyTorch hashes and prints whatever `weights_only` lets a pickle build."""
        before = PICKLES_OF_TENSORS[what]
        self.repack(saved, lambda name, content: before + content[2:] if name.endswith("data.pkl") else content)
        self.refuse(saved, "bytes of a tensor are damaged")

    def test_the_pickle_of_a_tensor_passes(self, saved: Path) -> None:
        self.repack(saved, lambda _, content: content)
        assert torch.equal(DistCheckpoint(saved).read([Region(self.NAME)])[0], torch.ones(4, 8))

    @pytest.mark.parametrize("size", [(1 << 32, 1 << 32), (1 << 61, 8), (1 << 61, 0, 8)], ids=str)
    def test_a_shape_whose_product_overflows(self, saved: Path, size: tuple[int, ...]) -> None:
        self.rewrite(saved, self.of_size(*size))
        self.refuse(saved, "a shape that no file can hold")

    def test_any_number_of_empty_rows(self, saved: Path) -> None:
        self.rewrite(saved, self.of_size(1 << 60, 0))
        assert DistCheckpoint(saved).read([Region(self.NAME, (3,))])[0].shape == (0,)

    def of_size(self, *size: int) -> Callable[[Metadata], None]:
        def change(metadata: Metadata) -> None:
            entry = metadata.state_dict_metadata[self.NAME]
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
            metadata.state_dict_metadata[self.NAME] = replace(entry, size=torch.Size(size), chunks=[chunk])
            for index in list(metadata.storage_data):
                metadata.storage_data[replace(index, offset=chunk.offsets)] = metadata.storage_data.pop(index)

        return change

    @pytest.mark.parametrize("index", [(), (3,)])
    @pytest.mark.parametrize("rows", [1 << 20, 1 << 40, 1 << 58])
    def test_a_tensor_larger_than_its_file(self, saved: Path, rows: int, index: tuple[int, ...]) -> None:
        def larger(metadata: Metadata) -> None:
            entry, size = metadata.state_dict_metadata[self.NAME], torch.Size([rows, 8])
            chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
            metadata.state_dict_metadata[self.NAME] = replace(entry, size=size, chunks=[chunk])

        self.rewrite(saved, larger)
        self.refuse(saved, r"names no file, or too few bytes", index=index)

    def test_a_chunk_twice(self, saved: Path) -> None:
        self.rewrite(saved, lambda metadata: metadata.state_dict_metadata[self.NAME].chunks.extend([
            *metadata.state_dict_metadata[self.NAME].chunks
        ]))  # fmt: skip
        self.refuse(saved, "has chunks missing or twice")

    def test_a_training_that_saves_meanwhile(
        self, dense: LiveRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The iteration is found once: what is noted and what is read are the same files."""
        checkpoint = tmp_path / "saved"
        shutil.copytree(dense.at(tp=2, pp=2) / "nvfp4", checkpoint)
        real = export_checkpoint.files_of

        def noted(path: Path, *, hashed: bool = False) -> SourceFiles:
            files = real(path, hashed=hashed)
            (checkpoint / "iter_0000008").mkdir()
            (checkpoint / "latest_checkpointed_iteration.txt").write_text("8")
            return files

        monkeypatch.setattr(export_checkpoint, "files_of", noted)
        convert(dense, checkpoint, tmp_path / "out", "nvfp4")
        assert (tmp_path / "out" / "config.json").is_file()

    @pytest.mark.parametrize("name", [".metadata", "latest_checkpointed_iteration.txt", "__0_0.distcp", "common.pt"])
    @pytest.mark.parametrize("kind", ["pipe", "circle", "directory", "sparse"])
    def test_something_else_in_the_place_of_a_file(self, saved: Path, name: str, kind: str) -> None:
        (saved / name).unlink(missing_ok=True)
        match kind:
            case "pipe":
                os.mkfifo(saved / name)
            case "circle":
                (saved / name).symlink_to(name)
            case "directory":
                (saved / name).mkdir()
            case _:
                (saved / name).touch()
                os.truncate(saved / name, 1 << 42)
        with pytest.raises(CheckpointError):
            opened = DistCheckpoint(saved)
            opened.read([Region(self.NAME)])
            read_arguments(opened)

    def test_a_state_that_becomes_shorter(self, tmp_path: Path) -> None:
        save({"state": b"bytes" * 100}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
        opened = DistCheckpoint(tmp_path)
        assert opened.state("state")
        (file,) = tmp_path.glob("*.distcp")
        os.truncate(file, 10)
        with pytest.raises(CheckpointError, match="became shorter"):
            opened.state("state")
        file.unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            opened.state("state")


def test_a_region_is_read_alone(dense: LiveRanks) -> None:
    checkpoint = DistCheckpoint(dense.at(tp=2, pp=2) / "plain")
    key = "decoder.layers.mlp.linear_fc1.weight"
    whole, one = checkpoint.read([Region(key), Region(key, (1,))])
    assert torch.equal(whole[1], one)
