"""The result of a verification, as data."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amaxbridge.export.verify.finding import Finding, Severity
from amaxbridge.export.verify.parallel_sizes import ParallelSize
from amaxbridge.export.verify.reference_weights import ErrorSummary, WeightError
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.names import kind_of

_log = logging.getLogger("amaxbridge")


def text(finding: Finding) -> str:
    """The finding as text for a log or an error."""
    return (
        f"{finding.rule} ({len(finding.problems)}):{listing(finding.problems)}\n"
        f"  in an engine: {finding.effect}\n  next: {finding.next_step}"
    )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Findings of all rules, and tables.

    Args:
        directory: the directory that was verified.
        tensors: number of tensors.
        modules: number of quantized modules.
        schemes: name of each scheme → its number of modules.
        rules: number of rules that were applied.
        findings: the rules that are broken.
        parallel: the parallel sizes, and the problems with each.
        errors: errors against the reference; empty without one.
    """

    directory: Path
    tensors: int
    modules: int
    schemes: dict[str, int]
    rules: int
    findings: tuple[Finding, ...]
    parallel: tuple[ParallelSize, ...]
    errors: tuple[WeightError, ...] = ()

    @property
    def failures(self) -> list[Finding]:
        """Findings that make the checkpoint unfit to serve."""
        return self._of(Severity.ERROR)

    @property
    def warnings(self) -> list[Finding]:
        """Findings for people to judge."""
        return self._of(Severity.WARNING)

    @property
    def ok(self) -> bool:
        """True if the checkpoint is fit to serve, with or without warnings."""
        return not self.failures

    def _of(self, severity: Severity) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity is severity]

    @property
    def projections(self) -> list[ErrorSummary]:
        """The errors against the reference, by projection, in the order of the model."""
        kinds: dict[tuple[str, str], list[WeightError]] = {}
        for each in self.errors:
            kinds.setdefault((kind_of(each.module), each.scheme), []).append(each)
        return [ErrorSummary.of(errors, projection) for (projection, _), errors in kinds.items()]

    def conclude(self, target: Path) -> None:
        """Ends an export: logs warnings, and raises on failures before anything is at `target`.

        Raises:
            CheckpointError: the output would not serve right; names every rule, the tensors and what an engine would
                do.
        """
        for finding in self.warnings:
            _log.warning("%s", text(finding))
        if not self.ok:
            raise CheckpointError(
                f"{target} would not serve right, and was not written:\n"
                + "\n".join(map(text, self.failures))
                + "\nverify=false writes it all the same"
            )

    def as_json(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "directory": str(self.directory),
            "ok": self.ok,
            "tensors": self.tensors,
            "quantized_modules": self.modules,
            "schemes": self.schemes,
            "rules": self.rules,
            "findings": [
                {
                    "rule": finding.rule,
                    "severity": str(finding.severity),
                    "in_an_engine": finding.effect,
                    "next_step": finding.next_step,
                    "problems": [{"subject": each.subject, "what": each.what} for each in finding.problems],
                }
                for finding in self.findings
            ],
            "parallel": [
                {"axis": each.axis, "size": each.size, "serves": each.serves, "problems": list(map(str, each.problems))}
                for each in self.parallel
            ],
            "projections": [
                {
                    "projection": each.projection,
                    "scheme": each.scheme,
                    "modules": each.modules,
                    "mean_snr_db": finite_or_none(each.mean_snr),
                    "worst_error": finite_or_none(each.worst.error),
                    "worst_module": each.worst.module,
                }
                for each in self.projections
            ],
        }


def finite_or_none(value: float) -> float | None:
    """A number as JSON has it, which represents no infinity and no NaN."""
    return value if math.isfinite(value) else None
