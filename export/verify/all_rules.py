"""`verify`: all rules on one checkpoint."""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from amaxbridge.export.progress import NoProgress, Progress
from amaxbridge.export.verify import config_rules, file_rules, fused_group_rules, name_rules, scale_rules, target_rules
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule
from amaxbridge.export.verify.parallel_sizes import parallel_sizes
from amaxbridge.export.verify.reference_weights import Reference, WeightError, error_rules, one_by_one
from amaxbridge.export.verify.state_rules import state_rules
from amaxbridge.export.verify.verify_report import VerifyReport
from amaxbridge.mappings.errors import UsageError

RULES: tuple[Rule, ...] = (
    *file_rules.RULES,
    *config_rules.RULES,
    *name_rules.RULES,
    *target_rules.RULES,
    *fused_group_rules.RULES,
    *scale_rules.RULES,
)
"""Those that need nothing but the checkpoint."""


def verify(
    directory: str | Path,
    *,
    reference: str | Path | None = None,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    tp: int = 1,
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks a checkpoint, quantized or not. Reads headers and scales; weights only with a reference.

    Args:
        directory: of safetensors with config.json.
        reference: what it was made from: a directory of plain weights, to measure the error of each, or a file of
            quantizer state, to compare scales with amax.
        expected: names and shapes of everything the unquantized model has, experts packed or not; by default those of
            the reference.
        tp: tensor-parallel size that it must serve at.
        progress: is told how far the weights of a reference are.

    Raises:
        UsageError: there is no such directory or reference.
    """
    directory, reference = Path(directory), reference and Path(reference)
    for path in (directory, reference):
        if path and not path.exists():
            raise UsageError(f"{path} does not exist: give a local directory")
    with ExitStack() as stack:
        view = stack.enter_context(CheckpointView(directory))
        rules, errors = list(RULES), list[WeightError]()
        if reference and reference.is_dir():
            original = stack.enter_context(Reference(reference, view.config))
            expected = original.shapes if expected is None else expected
            errors += original.errors(view, progress or NoProgress())
            rules += error_rules(errors)
        elif reference:
            rules += state_rules(reference)
        if tp > 1:
            rules.append(_tensor_parallel(tp))
        if expected is not None:
            view.expected = one_by_one(expected, view.tensors, view.config)
        findings = [finding for rule in rules if (finding := rule.finding(view)) is not None]
        return VerifyReport(
            directory,
            tensors=len(view.tensors),
            modules=len(view.quantized),
            schemes=dict(Counter(each.scheme.name if each.scheme else "unknown" for each in view.quantized)),
            rules=len(rules),
            findings=tuple(findings),
            parallel=parallel_sizes(view),
            errors=tuple(errors),
        )


def _tensor_parallel(tp: int) -> Rule:
    def misfits(view: CheckpointView) -> tuple[Problem, ...]:
        return parallel_sizes(view, (tp,))[0].problems

    return Rule(
        "tensor-parallel",
        "it serves at the wanted tensor-parallel size",
        "does not load, or loads and is wrong (NVFP4 with blocks that are cut)",
        "Serve at a size that the table has, or leave these modules unquantized",
        misfits,
    )
