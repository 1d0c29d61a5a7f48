"""What the verdicts come to: counts, an account of the faults, and the table of docs/architectures.md."""

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.sweep.architectures import PUBLISHED
from tests.sweep.judge_row import CRASHED, LIMIT, NOT_BUILT, NOT_LOADED, REFUSED, RIGHT, SCHEMES, WRONG

ORDER = (LIMIT, REFUSED, WRONG, CRASHED, NOT_BUILT)
COUNTED, FURTHER = "causal language models, images and text", "sequence to sequence, speech"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_TABLE = re.compile(r"(<!-- sweep -->\n).*(<!-- /sweep -->)", re.DOTALL)

Verdicts = Sequence[dict[str, Any]]


def worst(verdicts: Verdicts) -> str:
    """The verdict on a type: wrong or crashed if any layout or class is, else the worst of the published layouts."""
    rank = (NOT_BUILT, RIGHT, NOT_LOADED, LIMIT, REFUSED, CRASHED, WRONG)
    considered = [
        each["verdict"] for each in verdicts if each["layout"] == PUBLISHED or each["verdict"] in (WRONG, CRASHED)
    ]
    return max(considered or [NOT_BUILT], key=rank.index)


def by_type(verdicts: Verdicts, scheme: str, *, counted: bool) -> dict[str, list[dict[str, Any]]]:
    """The verdicts of a scheme on each type that the goal counts, or on each of the further types and classes."""
    types: dict[str, list[dict[str, Any]]] = {}
    for each in verdicts:
        if each["scheme"] == scheme and each["counted"] is counted:
            name = each["model_type"] if counted else f"{each['model_type']} {each['architecture']}"
            types.setdefault(name, []).append(each)
    return types


def summary(verdicts: Verdicts) -> dict[str, Counter[str]]:
    """What is counted → verdict → number of types."""
    return {
        f"{label}, {scheme}": Counter(map(worst, by_type(verdicts, scheme, counted=counted).values()))
        for label, counted in ((COUNTED, True), (FURTHER, False))
        for scheme in SCHEMES
    }


def counts_table(verdicts: Verdicts) -> list[str]:
    """The summary as lines of a table; `right` includes what is right and not loaded."""
    names = ("types", "right", "of these not loaded", *ORDER)
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for label, counts in summary(verdicts).items():
        cells = (sum(counts.values()), _right(counts), counts[NOT_LOADED], *(counts[each] for each in ORDER))
        lines.append(f"| {label} | {' | '.join(map(str, cells))} |")
    return lines


def _right(counts: Counter[str]) -> int:
    return counts[RIGHT] + counts[NOT_LOADED]


def fewer_than_committed(verdicts: Verdicts, page: Path = PAGE) -> list[str]:
    """What is right less often than the committed page says; nothing if it has no counts yet."""
    found = re.findall(r"^\| (.+?) \| \d+ \| (\d+) \|", page.read_text() if page.exists() else "", re.MULTILINE)
    committed = {label: int(right) for label, right in found}
    return [
        f"{label}: {_right(counts)} right, and {committed[label]} in {page.name}"
        for label, counts in summary(verdicts).items()
        if _right(counts) < committed.get(label, 0)
    ]


def kinds(verdicts: Verdicts) -> dict[str, list[str]]:
    """Kind of fault of what is wrong → the model types that have it, the commonest kind first."""
    found: dict[str, dict[str, None]] = {}
    for each in verdicts:
        for why in each["why"] if each["verdict"] == WRONG else ():
            if not why.startswith(("transformers", "no logits")):
                found.setdefault(why.partition(" (")[0], {})[each["model_type"]] = None
    return {kind: sorted(types) for kind, types in sorted(found.items(), key=lambda item: -len(item[1]))}


def faults(verdicts: Verdicts) -> str:
    """A readable account of everything that is not plainly right, the faults first."""
    lines = ["# Sweep", "", *counts_table(verdicts), "", "## Kinds", ""]
    lines += [f"- **{kind}**, {len(types)} types: {', '.join(types)}" for kind, types in kinds(verdicts).items()]
    for kind in (WRONG, CRASHED, REFUSED, LIMIT, NOT_LOADED, NOT_BUILT, RIGHT):
        lines += ["", f"## {kind}", ""]
        for each in verdicts:
            if each["verdict"] == kind and not (kind == RIGHT and not each["why"] and (each["coverage"] or 0) > 0.5):
                where = f"**{each['model_type']}** {each['architecture']} {each['scheme']} {each['layout']}"
                share = "" if each["coverage"] is None else f" (quantized {each['coverage']:.0%})"
                lines.append(f"- {where}{share}: " + " · ".join(why.replace("\n", " ")[:300] for why in each["why"]))
    return "\n".join(lines) + "\n"


def write_page(verdicts: Verdicts, page: Path = PAGE) -> None:
    """Puts the counts into the page, what is right in both schemes, and a row for each other type and class."""
    plain, lines = [], [f"| type | class | {' | '.join(SCHEMES)} | why |", "|---|---|" + "---|" * (1 + len(SCHEMES))]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in verdicts:
        rows.setdefault((each["model_type"], each["architecture"]), []).append(each)
    for (model_type, architecture), several in rows.items():
        cells = [worst([each for each in several if each["scheme"] == scheme]) for scheme in SCHEMES]
        if set(cells) == {RIGHT}:
            plain.append(f"{architecture} ({model_type})")
        else:
            lines.append(f"| {model_type} | {architecture} | {' | '.join(cells)} | {_why(several)} |")
    right = textwrap.wrap(f"Right in both schemes: {', '.join(plain)}.", 130, break_long_words=False)
    table = "\n".join([*counts_table(verdicts), "", *right, "", *lines])
    page.write_text(_TABLE.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page.read_text()))


def _why(verdicts: Verdicts) -> str:
    """Why a row is not right, in a few words."""
    reasons = dict[str, None]()
    for each in verdicts:
        if each["verdict"] in (LIMIT, NOT_LOADED):
            reasons |= {re.sub(r" \(\d+\): .*", "", why): None for why in each["why"] if "no logits" not in why}
        elif each["verdict"] == REFUSED:
            reasons[re.sub(r"/\S*/(published|modules|square)\S*", "source", each["why"][0])[:160]] = None
        elif each["verdict"] in (NOT_BUILT, CRASHED, WRONG):
            reasons[each["why"][0][:100]] = None
    return "; ".join(list(reasons)[:3]).replace("\n", " ").replace("|", "/")
