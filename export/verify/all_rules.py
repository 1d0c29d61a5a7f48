"""`verify`: all rules on one checkpoint."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from amaxbridge.export.architectures.engines import ENGINES, Engine
from amaxbridge.export.architectures.facts import GUESS
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.hub import reference_path
from amaxbridge.export.progress import NoProgress, Progress
from amaxbridge.export.verify import (
    config_rules,
    engine_rules,
    fact_rules,
    file_rules,
    fused_group_rules,
    name_rules,
    scale_rules,
    target_rules,
)
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.engine_readings import build_of
from amaxbridge.export.verify.fact_rules import architecture
from amaxbridge.export.verify.finding import Problem, Rule
from amaxbridge.export.verify.parallel_sizes import parallel_sizes
from amaxbridge.export.verify.reference_weights import Reference, WeightError, error_rules, one_by_one
from amaxbridge.export.verify.state_rules import state_rules
from amaxbridge.export.verify.verify_report import EVERY, NAMES, VerifyReport
from amaxbridge.mappings.errors import UsageError

RULES: tuple[Rule, ...] = (
    *file_rules.RULES,
    *config_rules.RULES,
    *name_rules.RULES,
    *fact_rules.RULES,
    *target_rules.RULES,
    *engine_rules.RULES,
    *fused_group_rules.RULES,
    *scale_rules.RULES,
)
"""Those that need nothing but the checkpoint."""


def verify(
    directory: str | Path,
    *,
    reference: str | Path | None = None,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    engine: str = EVERY,
    tp: int = 1,
    ep: int = 1,
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks a checkpoint, quantized or not. Reads headers and scales; weights only with a reference.

    Args:
        directory: of safetensors with config.json.
        reference: what it was made from: a directory of plain weights, to measure the error of each, or a file of
            quantizer state, to compare scales with amax.
        expected: names and shapes of everything the unquantized model has, experts packed or not; by default those of
            the reference.
        engine: the engine that must serve it: `vllm`, `sglang`, `transformers` or `runtime`. `all`: at least one.
        tp: tensor-parallel size that it must serve at.
        ep: expert-parallel size that it must serve at.
        progress: is told how far the weights of a reference are.

    Raises:
        UsageError: there is no such directory, reference or engine.
    """
    if engine not in (EVERY, *NAMES):
        raise UsageError(f"Unknown engine {engine!r}. Use {', '.join(NAMES)} or {EVERY}")
    directory, reference = given_path(directory), reference and reference_path(reference)
    for path in (directory, reference):
        if path and not path.exists():
            raise UsageError(f"{path} does not exist: give a local directory")
    with ExitStack() as stack:
        view = stack.enter_context(CheckpointView(directory))
        rules, errors = list(RULES), list[WeightError]()
        knowledge = view.once(architecture) or GUESS
        if reference and reference.is_dir():
            original = stack.enter_context(Reference(reference, knowledge))
            expected = original.shapes if expected is None else expected
            errors += original.errors(view, progress or NoProgress())
            original.check_unchanged()
            rules += error_rules(errors)
        elif reference:
            rules += state_rules(reference)
        if tp > 1 or ep > 1:
            rules.append(_parallel(tp, ep))
        if expected is not None:
            view.expected = one_by_one(expected, view.tensors, knowledge)
        report = verify_view(view, rules, errors, engine)
        view.check_unchanged()
        return report


def verify_view(
    view: CheckpointView, rules: Sequence[Rule] = RULES, errors: Sequence[WeightError] = (), engine: str = EVERY
) -> VerifyReport:
    """What rules find in a checkpoint that is open.

    Args:
        errors: of its weights, if they were measured.
        engine: as in `verify`.
    """
    return VerifyReport(
        view.directory,
        tensors=len(view.tensors),
        modules=len(view.quantized),
        schemes=dict(Counter(each.scheme.name if each.scheme else "unknown" for each in view.quantized)),
        rules=len(rules),
        findings=tuple(finding for rule in rules if (finding := rule.finding(view)) is not None),
        parallel=parallel_sizes(view),
        errors=tuple(errors),
        engine=engine,
        unknown=tuple(each.key for each in ENGINES if _is_unknown(view, each)),
    )


def _is_unknown(view: CheckpointView, engine: Engine) -> bool:
    """True if an engine that reads config.json by architecture has no model class of its own for this one."""
    has_classes = engine.facts is not None and bool(engine.facts.builds)
    return has_classes and bool(view.config.get("architectures")) and build_of(view, engine) is None


def _parallel(tp: int, ep: int) -> Rule:
    def misfits(view: CheckpointView) -> Iterator[Problem]:
        found = [*parallel_sizes(view, (tp,), whole_experts=ep > 1)[:1], *parallel_sizes(view, (ep,))[1:]]
        for each in found:
            for problem in each.problems:
                yield problem._replace(what=f"{each.axis}={each.size}: {problem.what}")

    return Rule(
        "parallel",
        "it serves at the wanted sizes of tensor and expert parallelism",
        "does not load, or loads and is wrong (NVFP4 with blocks that are cut)",
        "Serve at sizes that the table has, or leave these modules unquantized",
        misfits,
    )
