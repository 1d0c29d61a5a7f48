"""A page and JSON about a checkpoint: sizes, errors, amax, and what training left behind.

    write_report(directory, reference=HF)      report.html and report.json in the directory

README.md says what each part of the page is computed from.
"""

from pathlib import Path

from amaxbridge.export.disk.atomic_move import replace_file
from amaxbridge.export.disk.io_errors import explaining
from amaxbridge.export.output.config_and_index import json_bytes
from amaxbridge.export.output.model_card import note_snr
from amaxbridge.export.progress import Progress
from amaxbridge.export.report.facts import Facts, ModuleFacts, PartSize, gather
from amaxbridge.export.report.html_page import render, report_json
from amaxbridge.mappings.errors import UsageError

__all__ = ["Facts", "ModuleFacts", "PartSize", "gather", "render", "report_json", "write_report"]


def write_report(
    directory: Path,
    *,
    reference: Path | None = None,
    quant_state: Path | None = None,
    output: Path | None = None,
    card: bool = False,
    progress: Progress | None = None,
) -> Facts:
    """Writes `report.html` and `report.json` to `directory`, or to `output` if given; see `gather`.

    Args:
        card: also note the signal-to-noise ratio in the model card of `directory`.

    Raises:
        UsageError: `card` without a reference, or for a directory that amaxbridge did not write; and as `gather`.
        WriteError: the file system refuses.
    """
    if card and reference is None:
        raise UsageError("card=True needs reference=: the signal-to-noise ratio compares the weights with it")
    facts = gather(directory, reference, quant_state, progress)
    if card:
        note_snr(directory, facts.serving.errors)
    target = output or directory
    with explaining(target):
        target.mkdir(parents=True, exist_ok=True)
    replace_file(target / "report.html", render(facts).encode())
    replace_file(target / "report.json", json_bytes(report_json(facts)))
    return facts
