"""What the lowest versions that pyproject.toml allows cannot run: `pytest --lowest` leaves it out.

`tests/lowest_versions.txt` has a line for each: a test file, or a part of tests' ids, then `|` and the reason.
"""

from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT, TESTS

LIST = TESTS / "lowest_versions.txt"


class Lowest:
    """A plugin that leaves out what the list has."""

    def __init__(self) -> None:
        lines = LIST.read_text().splitlines()
        self._parts = [line.partition("|")[0].strip() for line in lines if not line.startswith("#")]

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Files, whose imports fail already."""
        return str(collection_path.relative_to(ROOT)) in self._parts or None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Tests, which the run then counts as deselected."""
        out = [item for item in items if any(part in item.nodeid for part in self._parts)]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def without_a_driver() -> None:
    """ModelOpt 0.44's NVFP4QTensor asks for the GPU's capability even where tensors are on the CPU."""
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda device=None: (0, 0)
