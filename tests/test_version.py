"""Every build says which it is: a checkout with its commit, an archive, a clone, with and without tags."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amaxbridge.build_version import build_version
from tests.support.paths import ENVIRONMENT, ROOT

FILES = ("pyproject.toml", "Makefile", ".git_archival.txt", ".gitattributes", "amaxbridge/archived_commit.txt")
# Neither the user's configuration of git counts, nor the repository of a hook that runs the tests.
ALONE = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("GIT_")}
ALONE |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
AUTHOR = ("-c", "user.name=test", "-c", "user.email=test@example.org")
BUILD_VERSION = "import amaxbridge.build_version as each; print(each.build_version())"


def git(directory: Path, *words: str) -> str:
    command = ["git", *AUTHOR, *words]
    return subprocess.run(command, cwd=directory, env=ALONE, check=True, capture_output=True, text=True).stdout.strip()


def scm_version(directory: Path) -> str:
    """The version that a build in a directory would have."""
    command = [sys.executable, "-m", "setuptools_scm"]
    return subprocess.run(command, cwd=directory, env=ALONE, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit of the files that decide the version, and no tag."""
    directory = tmp_path / "repository"
    for name in (*FILES, "amaxbridge/build_version.py"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes((ROOT / name).read_bytes())
    (directory / "amaxbridge" / "__init__.py").touch()
    git(directory, "init", "--quiet")
    git(directory, "add", ".")
    git(directory, "commit", "--quiet", "--message=first")
    return directory


def archive(repository: Path, to: Path) -> Path:
    to.mkdir()
    command = ["git", "archive", "HEAD"]
    packed = subprocess.run(command, cwd=repository, env=ALONE, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x"], cwd=to, input=packed, check=True)
    return to


def version_in(directory: Path) -> str:
    """The version of a directory that is installed in place, whose metadata has the version of its build."""
    metadata = directory / "amaxbridge-0.2.0.dev0.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: amaxbridge\nVersion: 0.2.0.dev0\n")
    command = [sys.executable, "-c", BUILD_VERSION]
    environment = {**ALONE, "PYTHONPATH": str(directory)}
    return subprocess.run(
        command, cwd=directory, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_without_tags(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "--short=7", "HEAD")
    assert scm_version(repository).startswith(f"0.2.0.dev1+g{commit}")
    assert scm_version(archive(repository, tmp_path / "archive")) == "0.2.0.dev0"
    assert commit in (tmp_path / "archive" / "amaxbridge" / "archived_commit.txt").read_text()
    assert version_in(tmp_path / "archive").partition("+g")[2].startswith(commit)


def test_with_a_tag(repository: Path, tmp_path: Path) -> None:
    git(repository, "tag", "--annotate", "v0.3.0", "--message=release")
    assert scm_version(repository) == "0.3.0"
    assert scm_version(archive(repository, tmp_path / "archive")) == "0.3.0"
    git(repository, "commit", "--allow-empty", "--quiet", "--message=second")
    after = f"0.3.0.post1.dev1+g{git(repository, 'rev-parse', '--short=7', 'HEAD')}"
    assert scm_version(repository).startswith(after)
    assert scm_version(archive(repository, tmp_path / "later")).startswith(after)


def test_a_checkout_says_its_commit_and_whether_files_differ(repository: Path) -> None:
    commit = git(repository, "rev-parse", "--short=7", "HEAD")
    _, _, local = version_in(repository).partition("+g")
    assert local.startswith(commit)
    assert not local.endswith(".dirty")
    (repository / "Makefile").write_text("")
    assert version_in(repository).endswith(".dirty")


def test_in_a_hook_of_another_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git tells its hooks, and what they start, where that repository is."""
    commit = git(repository, "rev-parse", "--short=7", "HEAD")
    for name, value in {"GIT_DIR": ".git", "GIT_WORK_TREE": ".", "GIT_INDEX_FILE": ".git/index"}.items():
        monkeypatch.setitem(ALONE, name, str(repository.parent / "another" / value))
    _, _, local = version_in(repository).partition("+g")
    assert local.startswith(commit)
    assert not local.endswith(".dirty")


def test_the_public_name_is_that_version() -> None:
    import amaxbridge

    assert amaxbridge.__version__ == build_version()
