"""The Hugging Face Hub: models by name, at a revision, and finished directories uploaded.

A name is `OWNER/MODEL` or `OWNER/MODEL@REVISION`: a branch, a tag or a commit. What is downloaded stays in the Hub's
cache, whose directories tell name and commit; weights are downloaded when they are needed.
"""

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.mappings.errors import OutputExistsError, UsageError, WriteError, listing

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)$")
_OF_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def model_directory(name: str | Path, *, weights: bool, revision: str | None = None) -> Path:
    """Returns a local directory, or the directory to which the Hub's model of this name is downloaded.

    Args:
        name: a directory, or a name on the Hub, with or without `@REVISION`.
        weights: True to download the weights, too.
        revision: branch, tag or commit of a model on the Hub; None for that of the name, or its main branch.

    Raises:
        UsageError: there is no such directory and no such model, or a directory has a revision.
    """
    path = given_path(name)
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"revision={revision} is for a model on the Hub, and {path} is a directory: leave it out")
        return path
    here = path.absolute()
    if path.exists():
        raise UsageError(f"{path} is a file: give the directory that it lies in")
    if path.is_absolute() or len(path.parts) != 2:
        raise UsageError(
            f"{here} is not there: give a directory, or the name of a model on the Hub (ORGANIZATION/MODEL)"
        )
    model, at, named = str(name).partition("@")
    if at and revision not in (None, named):
        raise UsageError(f"{name} and revision={revision} name two revisions: give one")
    try:
        return Path(
            snapshot_download(
                model, revision=revision or named or None, ignore_patterns=None if weights else list(_WEIGHTS)
            )
        )
    except (OSError, ValueError) as error:  # no network, no such model or revision, or no permission to read it
        raise UsageError(f"{here} is not there, and the Hub does not give a model {name}: {error}") from error


def hub_name(directory: Path | None) -> str | None:
    """`OWNER/MODEL` of a snapshot in the cache of the Hub; None for another directory."""
    found = _SNAPSHOT.search(directory.absolute().as_posix()) if directory else None
    return f"{found[1]}/{found[2]}" if found else None


def commit_of(directory: Path) -> str | None:
    """The commit of a snapshot in the cache of the Hub; None for another directory."""
    found = _SNAPSHOT.search(directory.absolute().as_posix())
    return found[3] if found else None


def check_name(option: str, name: str | None) -> None:
    """Raises UsageError if a name is given that no model on the Hub can have."""
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{option}={name} is no name of a model on the Hub, OWNER/MODEL") from error


def reference_path(reference: str | Path) -> Path:
    """What a reference is: a file, a directory, or a model on the Hub, which is downloaded."""
    path = given_path(reference)
    return path if path.exists() or path.suffix == ".safetensors" else model_directory(reference, weights=True)


def with_weights(directory: Path) -> Path:
    """The same directory; the weights of a model of the Hub's cache are downloaded if they are not there.

    Raises:
        UsageError: the Hub does not give them.
    """
    found = _SNAPSHOT.search(directory.absolute().as_posix())
    if found is None or any(directory.glob("*.safetensors")):
        return directory
    owner, model, commit = found.groups()
    try:
        cache = directory.absolute().parents[2]
        return Path(snapshot_download(f"{owner}/{model}", revision=commit, cache_dir=cache))
    except (OSError, ValueError) as error:
        raise UsageError(f"the Hub does not give the weights of {owner}/{model}: {error}") from error


def prepare_repo(name: str, *, private: bool | None = None, overwrite: bool = False) -> None:
    """Creates a model's repository on the Hub if there is none. Called before work begins, so that it is not in vain.

    Raises:
        UsageError: the name is none, or the token may not write there.
        OutputExistsError: the repository holds weights, and `overwrite` is False.
    """
    check_name("push_to_hub", name)
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        held = [each for each in api.list_repo_files(name) if each.endswith(".safetensors")]
    except Exception as error:  # whatever the library for HTTP raises, which depends on the client's version
        raise UsageError(f"push_to_hub={name}: {_why(error)}. `hf auth login` stores a token") from error
    if held and not overwrite:
        raise OutputExistsError(
            f"{name} on the Hub holds weights:{listing(held)}\nGive another name, or overwrite=True to replace them"
        )


def push_to_hub(directory: str | Path, name: str, *, private: bool | None = None, overwrite: bool = False) -> str:
    """Uploads a finished directory as a model on the Hub; a second call continues an interrupted upload.

    Weights that the repository held before and the directory does not have are deleted there, so that no two models are
    mixed.

    Args:
        directory: what an export wrote.
        name: `OWNER/MODEL`; created if it does not exist.
        private: True to create a private model; None for the default of the owner.
        overwrite: True to replace weights that are there.

    Returns:
        The address of the commit.

    Raises:
        UsageError: it is no directory with a config.json, or as `prepare_repo`.
        WriteError: the upload failed. The directory is complete, and the call can be repeated.
    """
    source = given_path(directory)
    if not (source / "config.json").is_file():
        raise UsageError(f"{source} has no config.json: give a directory that an export wrote")
    prepare_repo(name, private=private, overwrite=overwrite)
    try:
        commit = HfApi().upload_folder(
            repo_id=name, folder_path=source, commit_message="Upload by amaxbridge", delete_patterns=list(_OF_WEIGHTS)
        )
    except Exception as error:  # as above
        raise WriteError(
            f"the upload to {name} failed: {_why(error)}. {source} is complete, and can be uploaded again"
        ) from error
    return str(commit.commit_url)


def _why(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
