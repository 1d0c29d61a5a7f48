"""Names and links in an input never lead out of the input or out of the output."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amaxbridge.export import model_free_ptq
from amaxbridge.export.disk.input_paths import checked_name, leaves, weight_file_name
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.model_free.per_file import process_file
from amaxbridge.export.report import write_report
from amaxbridge.mappings.errors import CheckpointError, OutputExistsError
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


LONG = "a" * 4096
SPELLINGS = {
    "a very long part": f"{LONG}.safetensors",
    "many parts": "a/" * 2000 + "b.safetensors",
    "half of a character": "\ud800.safetensors",
    "a line break": "a\nb.safetensors",
    "a terminal's command": "\x1b[2J.safetensors",
    "a zero-width space": "a\u200b.safetensors",
    "right to left": "a\u202esrotcenetefas.safetensors",
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_names_that_no_file_has(source: Path, tmp_path: Path, what: str) -> None:
    """In an index: one error, of bounded length, that every terminal can show."""
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = SPELLINGS[what]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names the file|is not valid JSON") as raised:
        model_free_ptq(source, tmp_path / "out", "fp8_dynamic")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("one", "other"), [("A", "a"), ("\u00e4", "a\u0308"), ("\u00df", "SS")])
def test_names_that_are_one_where_case_does_not_count(tmp_path: Path, one: str, other: str) -> None:
    directory = write_checkpoint(tmp_path / "source", dense_model(layers=1), config=CONFIG)
    tensors = {name: each.read() for name, each in SafetensorsCheckpoint(directory).tensors.items()}
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for file, names in ((one, list(tensors)[::2]), (other, list(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, directory / f"{file}.safetensors")
        weight_map |= dict.fromkeys(names, f"{file}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="one file where case does not count"):
        model_free_ptq(directory, tmp_path / "out", "fp8_dynamic")


ODD_NAMES = (b"\xff\xfe.txt", b"a\nb.txt", b"\x1b[2J.txt", b"CON", b"nul.txt", b"a:b.txt", b" ", b"-rf", b"a" * 255)


def test_files_of_odd_names_are_carried(source: Path, tmp_path: Path) -> None:
    """Their names come from the directory, not from a file's text; the same bytes arrive under the same name."""
    for name in ODD_NAMES:
        (source / os.fsdecode(name)).write_bytes(name)
    for scheme in ("fp8_dynamic", "none"):
        model_free_ptq(source, tmp_path / "out", scheme, overwrite=True)
        found = {
            name: Path(os.fsdecode(os.fsencode(tmp_path / "out") + b"/" + name)).read_bytes() for name in ODD_NAMES
        }
        assert found == {name: name for name in ODD_NAMES}


def test_links_in_a_circle_are_named_and_left_out(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "self").symlink_to("self")
    (source / "one").symlink_to("two")
    (source / "two").symlink_to("one")
    (source / "up").symlink_to(".")
    (source / "deep").mkdir()
    (source / "deep" / "again").symlink_to("..")
    model_free_ptq(source, tmp_path / "out", "fp8_dynamic")
    assert all(f"{source / name} →" in caplog.text for name in ("self", "one", "two"))
    assert not any((tmp_path / "out" / name).exists() for name in ("self", "one", "two", "up", "deep"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "hf_quant_config.json"])
def test_a_description_behind_a_link_out_of_the_source_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text((source / name).read_text() if (source / name).exists() else "{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*outside\.json, outside of"):
        model_free_ptq(source, tmp_path / "out", "fp8_dynamic")


@pytest.mark.parametrize("name", ["report.html", "report.json", "README.md", "amaxbridge.json"])
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_report_writes_through_no_link(source: Path, tmp_path: Path, name: str, kind: str) -> None:
    """What it replaces is the link, never a file that is somewhere else, too."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    model_free_ptq(source, out, "fp8_dynamic")
    victim.write_bytes((out / name).read_bytes() if (out / name).exists() else b"precious")
    before = victim.read_bytes()
    (out / name).unlink(missing_ok=True)
    if kind == "link":
        (out / name).symlink_to(victim)
    else:
        (out / name).hardlink_to(victim)
    try:
        write_report(out, reference=source, card=True)
    except CheckpointError as error:
        assert kind == "link"
        assert "outside of" in str(error)
    assert victim.read_bytes() == before
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_a_file_replaces_only_files(source: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    (os.mkfifo if kind == "pipe" else os.mkdir)(place)
    with pytest.raises(OutputExistsError, match="exists and is not a file"):
        process_file({str(source / "first.safetensors"): None}, place, "nvfp4a16")
    assert not place.is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("place")] == ["place"]
