"""Checkpoints of Transformer Engine models load into Megatron's own layers, where norms have other names."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.bridge.stored.test_te_checkpoints import FIXTURES, tensors_of
from tests.support.launcher import Launcher, LiveRanks

CASES = ("dense", "dense_nvfp4", "grouped", "hybrid_nvfp4", "sequential_nvfp4")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cases")
    for case in CASES:
        with tarfile.open(FIXTURES / f"{case}.tar.xz") as archive:
            archive.extractall(directory, filter="data")
    return directory


@pytest.fixture(scope="module")
def loaded(launch: Launcher, cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LiveRanks(launch, "live_te_checkpoints.py", cases, tmp_path_factory.mktemp("loaded")).at()


@pytest.mark.parametrize("case", CASES)
def test_the_loaded_model_is_the_trained_one(cases: Path, loaded: Path, case: str) -> None:
    expected = json.loads((cases / case / "expected.json").read_text())["tensors"]
    assert tensors_of(loaded / case) == expected
