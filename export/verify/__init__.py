"""Checking that a checkpoint serves right: rules over headers, config.json and scales; with a reference, over weights,
too.

    report = verify(directory)                  seconds, whatever the size of the model
    report = verify(directory, reference=HF)    reads all weights of both
    report.conclude(target)                     raises if the checkpoint is not fit to serve

README.md lists the rules and explains how to add one.
"""

from amaxbridge.export.verify.all_rules import RULES, verify
from amaxbridge.export.verify.finding import Finding, Problem, Rule, Severity
from amaxbridge.export.verify.parallel_sizes import ParallelSize
from amaxbridge.export.verify.reference_weights import WeightError
from amaxbridge.export.verify.verify_report import VerifyReport

__all__ = [
    "RULES", "Finding", "ParallelSize", "Problem", "Rule", "Severity", "VerifyReport", "WeightError", "verify",
]  # fmt: skip
