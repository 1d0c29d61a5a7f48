"""`make family`: which tests are one family's, and the rows of docs/families.md that others keep."""

import pytest

from tests.support.one_family import OneFamily, published_models_of, tiny_models_of
from tests.support.parity import PAGE, table


def test_the_models_of_a_family() -> None:
    assert tiny_models_of("Glm4MoeForCausalLM") == ["GLM-4.5"]
    assert published_models_of("Glm4MoeForCausalLM") == ["GLM-4.5-Air"]


def test_a_family_that_is_not_there_is_refused() -> None:
    with pytest.raises(pytest.UsageError, match="has the architecture NewForCausalLM: put it into FAMILIES"):
        OneFamily("NewForCausalLM")
    with pytest.raises(SystemExit, match=r"tiny_models\.py has the architecture NewForCausalLM"):
        tiny_models_of("NewForCausalLM")


def test_a_family_that_is_not_measured_keeps_its_rows() -> None:
    """Every model has one: a family that was added without `make family` shows here."""
    page = PAGE.read_text()
    assert set(table((), page).splitlines()) <= set(page.splitlines())
