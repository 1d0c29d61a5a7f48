"""Models by name, at a revision, and finished directories uploaded: the real client against a Hub on this machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amaxbridge.export.hub import check_name, model_directory
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import dense_model, write_checkpoint
from tests.support.hub_stand_in import Hub, hub_stand_in

CONFIG = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_stand_in() as served:
        yield served


def amaxbridge(hub: Hub, place: Path, *words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "amaxbridge", *words]
    environment = hub.environment(place / "cache")
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    return done.returncode, done.stdout, done.stderr


def source(directory: Path, layers: int = 1) -> Path:
    return write_checkpoint(directory, dense_model(layers), config={**CONFIG, "num_hidden_layers": layers})


def test_from_a_name_to_a_name(hub: Hub, tmp_path: Path) -> None:
    """An older revision is quantized, verified against itself by name, and uploaded with its card."""
    old = hub.add("owner/tiny", source(tmp_path / "old", 2))
    hub.add("owner/tiny", source(tmp_path / "new", 1))
    hub.tags["v1"] = old
    words = ("input=owner/tiny@v1", "output=out", "scheme=nvfp4a16", "push_to_hub=me/tiny-NVFP4A16")
    status, said, error = amaxbridge(hub, tmp_path, "quantize", *words)
    assert status == 0, error
    number, files = hub.at("me/tiny-NVFP4A16") or ("", {})
    assert f"uploaded: {hub.address}/me/tiny-NVFP4A16/commit/{number}" in said
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "base_model: owner/tiny" in files["README.md"].decode()
    assert json.loads(files["config.json"])["num_hidden_layers"] == 2
    status, said, error = amaxbridge(hub, tmp_path, "verify", "input=out", "reference=owner/tiny@v1")
    assert status == 0, error
    assert "mean SNR" in said
    status, said, error = amaxbridge(hub, tmp_path, "report", "input=out", "reference=owner/tiny@v1")
    assert status == 0, error
    assert not json.loads((tmp_path / "out" / "report.json").read_text())["saturated"]


def test_revision_says_the_same(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("owner/tiny", source(tmp_path / "old", 2))
    hub.add("owner/tiny", source(tmp_path / "new", 1))
    words = ("input=owner/tiny", f"revision={old}", "output=out", "scheme=fp8_dynamic")
    assert amaxbridge(hub, tmp_path, "quantize", *words)[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    for words, said in (
        (("input=owner/tiny@main", f"revision={old}"), "name two revisions"),
        (("input=owner/tiny@v9",), "does not give a model owner/tiny@v9"),
        (("input=old", "revision=v1"), "revision=v1 is for a model on the Hub"),
        (("input=owner/none",), "does not give a model owner/none"),
    ):
        status, _, error = amaxbridge(hub, tmp_path, "quantize", *words, "output=other")
        assert status == 2 and said in error, error
        assert not (tmp_path / "other").exists()


def test_weights_there_are_not_mixed(hub: Hub, tmp_path: Path) -> None:
    """They are replaced only if the user says so, and then none of them is left."""
    source(tmp_path / "tiny")
    hub.commit("me/out", {"model-00001-of-00002.safetensors": b"old", "README.md": b"mine", "notes.txt": b"kept"})
    words = ("input=tiny", "output=out", "scheme=fp8_dynamic", "base_model=owner/tiny", "push_to_hub=me/out")
    status, _, error = amaxbridge(hub, tmp_path, "quantize", *words)
    assert status == 2 and "me/out on the Hub holds weights" in error
    assert "io.overwrite=true" in error and not (tmp_path / "out").exists()
    status, _, error = amaxbridge(hub, tmp_path, "quantize", *words, "io.overwrite=true")
    assert status == 0, error
    _, files = hub.at("me/out") or ("", {})
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]
    assert files["notes.txt"] == b"kept"
    assert "base_model: owner/tiny" in files["README.md"].decode()


def test_an_upload_that_fails_leaves_the_output(hub: Hub, tmp_path: Path) -> None:
    source(tmp_path / "tiny")
    hub.broken = True
    words = ("input=tiny", "output=out", "scheme=fp8_dynamic", "push_to_hub=me/out")
    status, _, error = amaxbridge(hub, tmp_path, "quantize", *words)
    assert status == 1 and "the upload to me/out failed" in error
    assert (tmp_path / "out" / "config.json").exists()


def test_a_hub_that_is_away(hub: Hub, tmp_path: Path) -> None:
    """Before any work, and without a foreign exception."""
    source(tmp_path / "tiny")
    hub.address = "http://127.0.0.1:9"
    words = ("input=tiny", "output=out", "scheme=fp8_dynamic", "push_to_hub=me/out")
    status, _, error = amaxbridge(hub, tmp_path, "quantize", *words)
    assert status == 2 and "push_to_hub=me/out" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "me/x y", "-me/x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=r"is no name of a model on the Hub"):
        check_name("push_to_hub", name)


def test_a_directory_is_taken_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert model_directory("owner/tiny", weights=True) == Path("owner/tiny")


def test_streamed(hub: Hub, tmp_path: Path) -> None:
    """The same bytes as from a directory, and no weights in the cache. Broken connections are tried again."""
    directory = source(tmp_path / "tiny", 2)
    hub.add("owner/tiny", directory)
    hub.unsteady = 3
    words = ("input=owner/tiny", "output=streamed", "scheme=nvfp4a16", "io.stream=true", "base_model=owner/tiny")
    status, _, error = amaxbridge(hub, tmp_path, "quantize", *words)
    assert status == 0, error
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert hub.unsteady == 0
    assert amaxbridge(hub, tmp_path, "quantize", "input=tiny", "output=local", "scheme=nvfp4a16")[0] == 0
    name = "model.safetensors"
    assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    fetched = sum(end - begin for begin, end in hub.ranges)
    assert fetched <= 1.01 * (directory / name).stat().st_size, "nothing is fetched twice"
    status, _, error = amaxbridge(hub, tmp_path, "quantize", "input=tiny", "output=other", "io.stream=true")
    assert status == 2 and "stream= is for a model on the Hub" in error
