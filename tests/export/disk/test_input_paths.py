"""Names and links of an input never lead out of it, nor out of the output."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amaxbridge.export import model_free_ptq
from amaxbridge.export.disk.input_paths import checked_name, leaves, weight_file_name
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.mappings.errors import CheckpointError
from tests.support.checkpoints import dense_model, write_checkpoint

OUTWARDS = (
    "../victim.safetensors",
    "/tmp/victim.safetensors",
    "a/../../victim.safetensors",
    "./victim.safetensors",
    "a//victim.safetensors",
    "",
    ".",
    "..",
    ".plan",
    "a/.done-0-of-1",
    "a\\..\\victim.safetensors",
    "victim\0.safetensors",
    "victim\n.safetensors",
    3,
    None,
    ["victim.safetensors"],
)
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1}


@pytest.mark.parametrize("name", OUTWARDS, ids=repr)
def test_names_that_lead_outwards_are_refused(name: object) -> None:
    with pytest.raises(CheckpointError, match="names the file"):
        checked_name(name, "index.json")


@pytest.mark.parametrize("name", ["model.safetensors", "a/b/model-00001-of-00002.safetensors", "größe 1.safetensors"])
def test_names_that_lead_downwards_pass(name: str) -> None:
    assert weight_file_name(name, "index.json") == name


def test_weights_are_safetensors() -> None:
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        weight_file_name("config.json", "index.json")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with an index over two files, one in a sub-directory."""
    directory = write_checkpoint(tmp_path / "source", dense_model(layers=1), config=CONFIG)
    tensors = SafetensorsCheckpoint(directory).tensors
    names = sorted(tensors)
    parts = {"first.safetensors": names[::2], "more/second.safetensors": names[1::2]}
    for file, members in parts.items():
        (directory / file).parent.mkdir(exist_ok=True)
        save_file({name: tensors[name].read() for name in members}, directory / file)
    (directory / "model.safetensors").unlink()
    weight_map = {name: file for file, members in parts.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def rename_in_index(source: Path, old: str, new: str) -> None:
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(json.dumps(old), json.dumps(new)))


def test_a_sub_directory_ends_up_where_engines_look(source: Path, tmp_path: Path) -> None:
    model_free_ptq(source, tmp_path / "out", "fp8_dynamic")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors")}
    assert written == {"first.safetensors", "more-second.safetensors"}


def test_file_names_that_would_become_one_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "more" / "second.safetensors").rename(source / "more" / "first.safetensors")
    (source / "first.safetensors").rename(source / "more-first.safetensors")
    rename_in_index(source, "more/second.safetensors", "more/first.safetensors")
    rename_in_index(source, "first.safetensors", "more-first.safetensors")
    with pytest.raises(CheckpointError, match=r"differ in / and - alone"):
        model_free_ptq(source, tmp_path / "out", "fp8_dynamic")


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_destroys_nothing_outside(source: Path, tmp_path: Path, absolute: bool) -> None:
    victim = tmp_path / "victim" / "x.safetensors"
    victim.parent.mkdir()
    shutil.copy(source / "first.safetensors", victim)
    content = victim.read_bytes()
    rename_in_index(source, "first.safetensors", str(victim) if absolute else "../victim/x.safetensors")
    with pytest.raises(CheckpointError, match="names the file"):
        model_free_ptq(source, tmp_path / "out", "fp8_dynamic")
    assert victim.read_bytes() == content
    assert not (tmp_path / "out").exists()


def test_weights_behind_a_link_out_of_the_source_are_refused(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "private.safetensors"
    (source / "first.safetensors").rename(outside)
    (source / "first.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"is a link to .*private\.safetensors, outside of"):
        model_free_ptq(source, tmp_path / "out", "fp8_dynamic")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "extra/vocab.txt", "whole_directory"])
def test_links_out_of_the_source_are_named_and_not_followed(
    source: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secrets"
    secret.mkdir()
    (secret / "key").write_text("a private key")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(secret if name == "whole_directory" else secret / "key")
    model_free_ptq(source, tmp_path / "out", "fp8_dynamic")
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(texts) >= 5
    assert not any(b"a private key" in text for text in texts)
    assert f"{source / name} → {(source / name).resolve()}" in caplog.text


def test_a_snapshot_of_the_hub_may_link_to_its_blobs_only(tmp_path: Path) -> None:
    entry, other = tmp_path / "models--me--mine", tmp_path / "models--you--yours" / "blobs" / "abc"
    snapshot, blob = entry / "snapshots" / "0123", entry / "blobs" / "abc"
    for path in (snapshot / "config.json", blob, other):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_text("{}")
    other.write_text("{}")
    (snapshot / "config.json").symlink_to(blob)
    (snapshot / "tokenizer.json").symlink_to(other)
    assert not leaves(snapshot / "config.json", snapshot)
    assert leaves(snapshot / "tokenizer.json", snapshot)


def test_a_source_that_is_a_link_itself_is_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with SafetensorsCheckpoint(tmp_path / "link") as checkpoint:
        assert all(torch.is_tensor(stored.read()) for stored in checkpoint.tensors.values())
