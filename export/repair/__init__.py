"""Mending served checkpoints that engines read wrong: without training, and without the original weights.

    report = repair("BAD", "GOOD")                  what verify finds and can be mended, mended
    report = repair("BAD", "GOOD", dry_run=True)    every change, nothing written

README.md lists what is mended, how, and what is refused.
"""

from amaxbridge.export.repair.edits import Change, Refusal
from amaxbridge.export.repair.repaired_directory import repair
from amaxbridge.export.repair.report import RepairReport

__all__ = ["Change", "Refusal", "RepairReport", "repair"]
