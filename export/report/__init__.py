"""A page and JSON about a checkpoint: sizes, errors, amax, what training left behind.

    write_report(directory, reference=HF)      report.html and report.json in the directory

See README.md for what each part of the page is computed from.
"""

from pathlib import Path

from export.metadata import json_bytes
from export.report.facts import Facts, ModuleFacts, PartSize, gather
from export.report.page import render, report_json

__all__ = ["Facts", "ModuleFacts", "PartSize", "gather", "render", "report_json", "write_report"]


def write_report(
    directory: Path, *, reference: Path | None = None, quant_state: Path | None = None, output: Path | None = None
) -> Facts:
    """Writes `report.html` and `report.json`, in `directory` unless `output` is given; see `gather`."""
    facts = gather(directory, reference, quant_state)
    target = output or directory
    target.mkdir(parents=True, exist_ok=True)
    (target / "report.html").write_text(render(facts), encoding="utf-8")
    (target / "report.json").write_bytes(json_bytes(report_json(facts)))
    return facts
