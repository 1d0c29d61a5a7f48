"""The tests of one family and nothing else: `pytest --family ArceeForCausalLM`, which `make family` runs.

These are the cases of its tiny models, its published models, its class and its golden table, and the few tests that
ask if each family is everywhere it has to be. `make test` runs all of them, too.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from amaxbridge.mappings.families import FAMILIES
from amaxbridge.mappings.family import ModelFamily
from tests.support.paths import PUBLISHED_MODELS
from tests.support.tiny_models import TINY_MODELS

OF_EVERY_FAMILY = ("test_every_family_is_here", "test_every_family_is_of_a_known_architecture")


def tiny_models_of(architecture: str) -> list[str]:
    """The rows of `tiny_models.py` with this architecture.

    Raises:
        SystemExit: there is none.
    """
    names = [name for name, tiny in TINY_MODELS.items() if architecture in tiny.make().architectures]
    return names or sys.exit(f"no row of tests/support/tiny_models.py has the architecture {architecture}: add one")


def published_models_of(architecture: str) -> list[str]:
    """The files of `tests/published_models/` with this architecture, without their suffix."""
    configs = {file.stem: json.loads(file.read_text()) for file in PUBLISHED_MODELS.glob("*.json")}
    return [name for name, config in configs.items() if architecture in config["architectures"]]


class OneFamily:
    """A plugin that deselects the tests of other families.

    Raises:
        pytest.UsageError: the family is not in FAMILIES. The message lists those that are.
    """

    def __init__(self, architecture: str) -> None:
        known = [name for family in FAMILIES for name in family.architectures]
        if architecture not in known:
            raise pytest.UsageError(
                f"no family in mappings/families/__init__.py has the architecture {architecture}: put it into "
                f"FAMILIES, or give one of {', '.join(known)}"
            )
        self._names = {architecture, *tiny_models_of(architecture), *published_models_of(architecture)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._takes(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def _takes(self, item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        values = call.params.values() if call else ()
        return getattr(item, "originalname", None) in OF_EVERY_FAMILY or any(self._is_of(value) for value in values)

    def _is_of(self, value: Any) -> bool:
        match value:
            case str():
                return value in self._names
            case Path():
                return value.parent == PUBLISHED_MODELS and value.stem in self._names
            case ModelFamily():
                return not self._names.isdisjoint(value.architectures)
        return False
