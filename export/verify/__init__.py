"""Does a checkpoint serve right? Rules over headers, config.json and scales; with a reference, over weights too.

    report = verify(directory)                  seconds, whatever the size of the model
    report = verify(directory, reference=HF)    reads all weights of both
    report.conclude(target)                     raises where the checkpoint is not fit to serve

See README.md for the rules and how to add one.
"""

from export.verify.finding import Finding, Problem, Rule, Severity
from export.verify.parallel import ParallelSize
from export.verify.reference import WeightError
from export.verify.report import VerifyReport
from export.verify.verifying import RULES, verify

__all__ = [
    "RULES", "Finding", "ParallelSize", "Problem", "Rule", "Severity", "VerifyReport", "WeightError", "verify",
]  # fmt: skip
