"""Which tests are slow: a list of measured seconds, which says what the fast lane leaves out and what begins first.

`tests/slow_tests.txt` has every test function that takes SLOW seconds of processor time or more: all of its cases, the
processes that they start, and the fixtures that they use. `make slow-tests` measures and writes it. A test that starts
Megatron's ranks is slow in any case, because the process that they are forked from takes ten seconds to start.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.support.paths import TESTS

LIST = TESTS / "slow_tests.txt"
SLOW = 0.35  # seconds
RANKS = "launch"


def listed() -> dict[str, float]:
    """Test function → seconds."""
    lines = [line.split() for line in LIST.read_text().splitlines()]
    return {function: float(seconds) for seconds, function in lines}


def mark_and_order(items: list[pytest.Item]) -> None:
    """Marks slow tests, and puts the files that take longest first, so that two workers end at the same time."""
    seconds = listed()
    files = Counter[str]()
    for function, cost in seconds.items():
        files[function.partition("::")[0]] += cost  # type: ignore[assignment]  # a Counter of seconds
    for item in items:
        if function_of(item) in seconds or RANKS in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: -files[item.nodeid.partition("::")[0]])


def function_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


class Measuring:
    """A plugin that measures a run and writes the list."""

    def __init__(self) -> None:
        self._calls = defaultdict[str, float](float)
        self._fixtures = defaultdict[Any, float](float)
        self._used = defaultdict[str, set[Any]](set)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before = processor_seconds()
        try:
            return (yield)
        finally:
            self._fixtures[fixturedef] += processor_seconds() - before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Any:
        before = processor_seconds()
        try:
            return (yield)
        finally:
            self._calls[function_of(item)] += processor_seconds() - before
            self._used[function_of(item)] |= {each[-1] for each in item._fixtureinfo.name2fixturedefs.values()}

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            LIST.write_text("".join(f"{seconds:.1f} {function}\n" for function, seconds in self._slow()))

    def _slow(self) -> Iterator[tuple[str, float]]:
        for function, own in sorted(self._calls.items()):
            seconds = own + sum(self._fixtures[fixture] for fixture in self._used[function])
            if seconds >= SLOW:
                yield function, seconds


def processor_seconds() -> float:
    """Processor seconds of this process and of all its descendants, running or ended."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
