"""Shows that the package resolves in the environments of `environments.toml`: `make resolve`.

Nothing is installed: uv resolves the pins of each environment together with our requirements, as pyproject.toml has
them, for Python 3.12 on Linux. Exit status 1 where one does not.
"""

import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from tests.support.paths import ROOT

SHOWN = ("torch", "numba", "numpy", "transformers", "megatron-core", "nvidia-modelopt", "compressed-tensors")
PYTHON, PLATFORM = "3.12", "linux"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One table of `environments.toml`, whose head explains the fields."""

    name: str
    pins: Sequence[str]
    extras: Sequence[str] = ()
    builds: Mapping[str, str] | None = None
    unproven: str = ""
    platform: str = PLATFORM


def requirements(extras: Iterable[str]) -> list[str]:
    """Our requirements, including those of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]


def resolved(wanted: Sequence[str], platform: str) -> dict[str, str] | str:
    """The version of each package, or why there is no resolution."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "-"]
    options = ["--python-version", PYTHON, "--python-platform", platform, "--no-strip-extras"]
    ran = subprocess.run([*command, *options], input="\n".join(wanted), capture_output=True, text=True)
    if ran.returncode:
        return ran.stderr
    lines = (line.partition("==") for line in ran.stdout.splitlines())
    return {name.partition("[")[0]: version for name, _, version in lines}


def refused(builds: Mapping[str, str], ours: Sequence[str]) -> list[str]:
    """Our requirements that a build does not meet."""
    wanted = [Requirement(each) for each in ours]
    return [str(each) for each in wanted if each.name in builds and not _meets(each, builds[each.name])]


def _meets(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version, prereleases=True)


def main() -> int:
    """Prints the table; returns how many environments do not resolve."""
    table = Table("environment", "our extras", *SHOWN, title="Python 3.12, Linux")
    file = tomllib.loads((Path(__file__).parent / "environments.toml").read_text())
    problems, open_ends = list[str](), list[str]()
    for environment in (Environment(**each) for each in file["environment"]):
        ours = requirements(environment.extras)
        found = resolved([*environment.pins, *ours], environment.platform)
        wrong = refused(environment.builds or {}, ours)
        if isinstance(found, str) or wrong:
            problems.append(f"{environment.name}: {found if isinstance(found, str) else wrong}")
            cells = ["does not resolve"]
        else:
            cells = [found.get(name, "") for name in SHOWN]
        table.add_row(environment.name, ", ".join(environment.extras), *cells)
        if environment.unproven:
            open_ends.append(f"{environment.name}: not shown for {environment.unproven}")
    console = Console(width=160)
    console.print(table)
    for line in [*open_ends, *problems]:
        console.print(line, markup=False)
    return len(problems)


if __name__ == "__main__":
    sys.exit(main() and 1)
