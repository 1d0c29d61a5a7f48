"""What the engines' dispatch imports from its own package: each name is a recorder."""

from tests.engines.dispatch import Chosen


def __getattr__(name: str) -> Chosen:
    if name.startswith("__"):
        raise AttributeError(name)
    return Chosen(name)
