"""A few seeded seconds of `make fuzz`: whatever bytes an entry reads, it ends well or in an error of ours."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.cases import ENTRIES, run_case
from tests.fuzz.inputs import make_inputs

CASES = 12  # of each entry

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_inputs(root)
    return root


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_input_ends_in_another_exception(inputs: Path, tmp_path: Path, entry: str) -> None:
    seen = Counter[str]()

    @settings(max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck])
    @given(st.randoms(use_true_random=False))
    def cases(random: Random) -> None:
        found = run_case(inputs, tmp_path, entry, random)
        seen[found.what] += 1
        assert not found.is_bad, f"{found.change}: {found.what}\n{found.detail}"

    cases()
    assert sum(seen.values()) >= CASES


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_inputs_themselves_are_good(inputs: Path, tmp_path: Path, entry: str) -> None:
    found = run_case(inputs, tmp_path, entry, Random(0), changed=False)
    assert found.what == "done", found.detail
