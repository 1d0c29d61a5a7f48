"""The result of a verification, as data."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from amaxbridge.export.architectures.engines import ENGINES, RUNTIME, Engine
from amaxbridge.export.verify.finding import Finding, Severity
from amaxbridge.export.verify.parallel_sizes import ParallelSize
from amaxbridge.export.verify.reference_weights import ErrorSummary, WeightError
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.names import kind_of

EVERY = "all"
"""What users call all engines."""
NAMES: Mapping[str, Engine] = MappingProxyType({each.key: each for each in (*ENGINES, RUNTIME)})
"""What users call an engine → the engine."""

_log = logging.getLogger("amaxbridge")


def text(finding: Finding) -> str:
    """The finding as text for a log or an error."""
    return (
        f"{finding.rule} ({len(finding.problems)}):{listing(finding.problems)}\n"
        f"  in an engine: {finding.effect}\n  next: {finding.next_step}"
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verify says of one engine.

    Args:
        engine: key of the engine.
        findings: rules that are broken for it, each with the problems that it has.
        known: False if the engine has no model class of its own for the architecture: vLLM and SGLang then run the
            model of transformers, whose names and layers were not read; the usual ones are assumed.
    """

    engine: str
    findings: tuple[Finding, ...]
    known: bool

    @property
    def name(self) -> str:
        """Name and version of the engine."""
        return NAMES[self.engine].label

    @property
    def serves(self) -> bool:
        """True if no rule that it breaks is an error."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """The errors."""
        return [each for each in self.findings if each.severity is Severity.ERROR]


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
        engine: the engine that was asked about, or `all`.
        unknown: engines that have no model class of their own for the architecture.
    """

    directory: Path
    tensors: int
    modules: int
    schemes: dict[str, int]
    rules: int
    findings: tuple[Finding, ...]
    parallel: tuple[ParallelSize, ...]
    errors: tuple[WeightError, ...] = ()
    engine: str = EVERY
    unknown: tuple[str, ...] = ()

    @property
    def verdicts(self) -> list[Verdict]:
        """A verdict for each engine."""
        return [self.verdict_of(engine) for engine in NAMES]

    def verdict_of(self, engine: str) -> Verdict:
        """What is found for one engine."""
        own = ((finding, finding.of(engine)) for finding in self.findings)
        found = tuple(replace(finding, problems=problems) for finding, problems in own if problems)
        return Verdict(engine, found, engine not in self.unknown)

    @property
    def failures(self) -> list[Finding]:
        """Findings that make the checkpoint unfit to serve, for the engine that was asked about or for all."""
        errors = self._of(Severity.ERROR)
        if self.engine != EVERY:
            return self.verdict_of(self.engine).failures
        if any(self.verdict_of(engine.key).serves for engine in ENGINES):
            return []
        return [finding for finding in errors if finding.of_all] or errors

    @property
    def warnings(self) -> list[Finding]:
        """Findings for people to judge."""
        return self._of(Severity.WARNING)

    @property
    def ok(self) -> bool:
        """True if the engine that was asked about serves the checkpoint, or, of all, at least one.

        Our runtime reads checkpoints and serves none: it counts only if it was asked about.
        """
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

        A checkpoint that our runtime alone reads is written, with a warning: engines learn.

        Raises:
            CheckpointError: the output would not serve right; names every rule, the tensors and what an engine would
                do.
        """
        for finding in self.warnings:
            _log.warning("%s", text(finding))
        if not self.ok and not self.verdict_of(RUNTIME.key).serves:
            raise CheckpointError(
                f"{target} would not serve right, and was not written:\n"
                + "\n".join(map(text, self.failures))
                + "\nverify=False writes it all the same"
            )
        for engine in ENGINES:
            verdict = self.verdict_of(engine.key)
            if not verdict.serves:
                _log.warning("%s does not serve it:\n%s", verdict.name, "\n".join(map(text, verdict.failures)))

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
                    "repair": finding.mend,
                    "problems": [
                        {"subject": each.subject, "what": each.what, "engine": each.engine} for each in finding.problems
                    ],
                }
                for finding in self.findings
            ],
            "engines": {
                verdict.engine: {
                    "name": verdict.name,
                    "serves": verdict.serves,
                    "known": verdict.known,
                    "rules": [each.rule for each in verdict.failures],
                }
                for verdict in self.verdicts
            },
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
                    "lowest_snr_db": finite_or_none(each.worst.snr),
                    "worst_error": finite_or_none(each.worst.error),
                    "worst_module": each.worst.module,
                }
                for each in self.projections
            ],
        }


def db_text(decibels: float) -> str:
    """A signal-to-noise ratio as people read it, in verify and in reports alike."""
    return f"{decibels:.1f} dB" if math.isfinite(decibels) else "exact"


def finite_or_none(value: float) -> float | None:
    """A number as JSON has it, which represents no infinity and no NaN."""
    return value if math.isfinite(value) else None
