"""Every family on both sides: transformers' logits against Megatron's, and the weights there and back.

`make parity` runs this file as a program, which prints the table and writes it into docs/families.md. Given
architectures, it measures the rows of these families and keeps the others.
"""

import json
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher
from tests.support.one_family import tiny_models_of
from tests.support.paths import ROOT, WORKERS
from tests.support.tiny_models import TINY_MODELS, TinyModel, save_tiny_model

A_LAUNCH = 10
"""Models in one launch: Megatron keeps the process groups of every mesh, and gloo two threads for each."""
PAGE = ROOT / "docs" / "families.md"
_TABLE = re.compile(r"(<!-- parity -->\n).*?(<!-- /parity -->)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One model at one mesh, and what its ranks found."""

    model: str
    sizes: dict[str, int]
    hf: Path
    back: Path
    found: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The model as Megatron saves it, with its arguments."""
        return Path(f"{self.back}_checkpoint")

    @property
    def label(self) -> str:
        return " ".join(f"{axis.upper()}={size}" for axis, size in self.sizes.items() if size > 1) or "one process"

    @property
    def same_weights(self) -> bool:
        """True if the exported tensors have the source's names and bits."""
        source, exported = tensors_in(self.hf), tensors_in(self.back)
        return source.keys() == exported.keys() and all(exported[name].equal(source[name]) for name in source)


def processes(sizes: dict[str, int]) -> int:
    """The number of processes that a mesh needs."""
    return max(sizes["tp"] * sizes.get("pp", 1), sizes.get("ep", 1))


def meshes_of_ranks(tiny: TinyModel) -> list[dict[str, int]]:
    """The meshes of several ranks, or of one where there is no other."""
    every = [dict(sizes) for sizes in tiny.meshes]
    return [sizes for sizes in every if processes(sizes) > 1] or every


def run_parity(
    launch: Launcher, root: Path, models: Collection[str] = TINY_MODELS.keys(), *, one_rank: bool = True
) -> list[Case]:
    """These models of the table at their meshes: a launch for a few models that need as many processes.

    Args:
        one_rank: False to leave out one rank where there are meshes of several: they compute the same.
    """
    planned: list[tuple[str, dict[str, int]]] = []
    for number, (name, tiny) in enumerate(TINY_MODELS.items()):
        if name in models and not tiny.unbuildable:
            save_tiny_model(tiny, root / str(number))
            meshes = [dict(sizes) for sizes in tiny.meshes] if one_rank else meshes_of_ranks(tiny)
            planned += [(name, sizes) for sizes in meshes]
    directories = {name: root / str(number) for number, name in enumerate(TINY_MODELS)}
    cases: list[Case] = []
    for count in sorted({processes(sizes) for _, sizes in planned}):
        fitting = [(name, sizes) for name, sizes in planned if processes(sizes) == count]
        for part, chosen in enumerate(batched(fitting, A_LAUNCH)):
            out = root / f"found_{count}_{part}.json"
            places = [(directories[name], root / f"back_{count}_{part}_{at}") for at, (name, _) in enumerate(chosen)]
            work = [
                {"hf": str(hf), "back": str(back), "sizes": sizes, "model_class": TINY_MODELS[name].model_class}
                for (hf, back), (name, sizes) in zip(places, chosen, strict=True)
            ]
            launch(WORKERS / "live_parity.py", json.dumps(work), out, processes=count)
            results = json.loads(out.read_text())
            cases += [
                Case(name, sizes, *place, found)
                for (name, sizes), place, found in zip(chosen, places, results, strict=True)
            ]
    return cases


def table(cases: Sequence[Case], old: str = "") -> str:
    """Markdown: a row for each model, the worst of its meshes. One without a case keeps its row of the old table."""
    rows = {row.split("|")[1].strip(): row for row in old.splitlines() if row.startswith("|")}
    return "\n".join(_rows(cases, rows)) + "\n"


def _rows(cases: Sequence[Case], old: Mapping[str, str]) -> Iterator[str]:
    yield "| tiny model | meshes | logits: relative error | largest | weights there and back |"
    yield "|---|---|---:|---:|---|"
    for name, tiny in TINY_MODELS.items():
        mine = [case for case in cases if case.model == name]
        if tiny.unbuildable:
            yield f"| {name} | names and shapes only: {tiny.unbuildable} | | | |"
            continue
        if not mine:
            yield old.get(name) or sys.exit(f"docs/families.md has no row of {name}: run make parity")
            continue
        relative, largest = (max(case.found["logits"][kind] for case in mine) for kind in ("relative", "largest"))
        same = "equal" if all(case.same_weights for case in mine) else "**differ**"
        yield f"| {name} | {', '.join(case.label for case in mine)} | {relative:.0e} | {largest:.0e} | {same} |"


def main(architectures: Sequence[str]) -> None:
    models = [name for architecture in architectures for name in tiny_models_of(architecture)] or list(TINY_MODELS)
    page = PAGE.read_text()
    with tempfile.TemporaryDirectory() as directory:
        (logs := Path(directory) / "logs").mkdir()
        launcher = Launcher(logs)
        try:
            found = table(run_parity(launcher, Path(directory), models), page)
        finally:
            launcher.close()
    print(found)
    PAGE.write_text(_TABLE.sub(lambda marks: marks[1] + found + marks[2], page))


if __name__ == "__main__":
    main(sys.argv[1:])
