"""The result of a repair, as data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amaxbridge.export.repair.edits import Change, Refusal
from amaxbridge.export.verify.finding import Finding
from amaxbridge.export.verify.verify_report import VerifyReport


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was repaired, or with `dry_run` would be.

    Args:
        source: the checkpoint that was looked at.
        changes: everything that is changed; nothing else is.
        refusals: what is wrong and was left.
        before: what `verify` finds in the checkpoint.
        after: what it finds with all changes.
        files: the files that are written anew; all others are carried over byte for byte.
        written: True if there is an output.
        resumed: number of tensor files that an interrupted run had finished.
    """

    source: Path
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    before: VerifyReport = field(repr=False)
    after: VerifyReport = field(repr=False)
    files: tuple[str, ...] = ()
    written: bool = False
    resumed: int = 0

    @property
    def ok(self) -> bool:
        """True if the checkpoint serves with all changes, as `VerifyReport.ok`."""
        return self.after.ok

    @property
    def left(self) -> tuple[Finding, ...]:
        """The findings of `verify` that stay: errors, warnings and notes."""
        return self.after.findings

    def as_json(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "source": str(self.source),
            "ok": self.ok,
            "written": self.written,
            "files": list(self.files),
            "changes": [
                {
                    "mend": each.mend,
                    "subject": each.subject,
                    "what": each.what,
                    "weights": None if each.moved is None else {"rms": each.moved.rms, "largest": each.moved.largest},
                }
                for each in self.changes
            ],
            "refusals": [{"mend": each.mend, "subject": each.subject, "why": each.why} for each in self.refusals],
            "before": self.before.as_json(),
            "after": self.after.as_json(),
        }
