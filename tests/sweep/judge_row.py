"""One row of the sweep: build, save, quantize, judge."""

import contextlib
import io
import json
import logging
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.sweep.architectures import LAYOUTS, SQUARE, Row
from tests.sweep.shrunken_configs import EXPERTS, VOCABULARY

if TYPE_CHECKING:
    from tests.sweep.file_oracle import Findings

SCHEMES = ("fp8_dynamic", "nvfp4a16")
RIGHT, NOT_LOADED, LIMIT, REFUSED = "right", "right, not loaded", "limit", "refused"
WRONG, CRASHED, NOT_BUILT = "wrong", "crashed", "not built"
CANNOT_LOAD = {"does not load", "missing keys", "unexpected keys", "mismatched keys", "conversion errors"}
"""What transformers itself says of a format that it cannot load: then the files alone are judged."""


@dataclass(slots=True)
class Verdict:
    """The verdict on one row, scheme and layout.

    Args:
        counted: see `Row`.
        layout: `published`; `modules`, the layout of transformers' modules where it differs; `square`, with packed
            experts of which no shape says which side is the input.
        verdict: right; right by its bytes, and not loaded by transformers; limit (transformers loads it without a word
            and computes something else); refused; wrong (silently); crashed; or not built.
        why: kinds of faults, each with how often it was seen and its first example.
        coverage: quantized share of the weights that may be quantized.
    """

    model_type: str
    architecture: str
    counted: bool
    scheme: str
    layout: str
    verdict: str
    why: list[str] = field(default_factory=list)
    coverage: float | None = None
    seconds: float = 0.0


def judge(row: Row, schemes: Sequence[str] = SCHEMES, layouts: Sequence[str] = LAYOUTS) -> list[dict[str, Any]]:
    """All verdicts on a row, as dicts; never raises."""
    logging.disable(logging.ERROR)
    verdicts = []
    started = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for scheme, layout, verdict, why, coverage in _verdicts(row, schemes, layouts):
            now = time.monotonic()
            made = Verdict(
                row.model_type, row.architecture, row.counted, scheme, layout, verdict, why, coverage, now - started
            )
            verdicts.append(asdict(made))
            started = now
    return verdicts


Outcome = tuple[str, list[str], float | None]


def _verdicts(
    row: Row, schemes: Sequence[str], layouts: Sequence[str]
) -> Iterator[tuple[str, str, str, list[str], float | None]]:
    try:
        case = Case(row)
    except Exception as error:
        yield from ((scheme, layouts[0], NOT_BUILT, _told(error), None) for scheme in schemes)
        return
    with tempfile.TemporaryDirectory() as scratch:
        done: list[dict[str, Any]] = []
        for layout in layouts:
            tried = schemes
            if layout == SQUARE:
                if not case.has_experts:
                    continue
                tried = schemes[:1]
            directory = Path(scratch) / layout
            try:
                if layout == SQUARE:
                    case = Case(row, square=True)
                shapes = case.save(directory, layout)
            except Exception as error:
                yield from ((scheme, layout, NOT_BUILT, _told(error), None) for scheme in tried)
                continue
            if shapes in done:
                continue
            done.append(shapes)
            for scheme in tried:
                try:
                    yield scheme, layout, *case.verdict(directory, Path(scratch) / f"{layout}-{scheme}", scheme)
                except Exception as error:
                    yield scheme, layout, CRASHED, ["the sweep itself: " + _told(error)[0], *_told(error)[1:]], None


class Case:
    """A random model, its matrices and its logits."""

    def __init__(self, row: Row, *, square: bool = False) -> None:
        from tests.sweep.loading_oracle import first_logits
        from tests.sweep.random_models import build
        from tests.sweep.true_matrices import matrices

        self.model = build(row.model_type, row.architecture, square=square)
        self.truth = matrices(self.model, EXPERTS, VOCABULARY)
        self.reference = first_logits(self.model)

    @property
    def has_experts(self) -> bool:
        return any(matrix.kind == "expert" for matrix in self.truth)

    def save(self, directory: Path, layout: str) -> dict[str, Any]:
        """Saves the model and returns the shapes of its tensors."""
        from tests.sweep.file_oracle import read_tensors
        from tests.sweep.random_models import save

        save(self.model, directory, layout)
        return {name: tensor.shape for name, tensor in read_tensors(directory).items()}

    def verdict(self, source: Path, output: Path, scheme: str) -> Outcome:
        """Quantizes a directory and judges what was written."""
        from amaxbridge.export.model_free.whole_directory import model_free_ptq
        from amaxbridge.mappings.errors import AmaxbridgeError

        try:
            model_free_ptq(source, output, scheme)
        except AmaxbridgeError as error:
            return REFUSED, [f"{type(error).__name__}: {str(error)[:600]}"], None
        except Exception as error:
            return CRASHED, _told(error), None
        return self.judge(source, output, scheme)

    def judge(self, source: Path, output: Path, scheme: str) -> Outcome:
        """Judges a quantized directory."""
        from tests.sweep.file_oracle import BOUNDS
        from tests.sweep.loading_oracle import RUNNING, judge_loading

        bound = BOUNDS[scheme]
        findings, limits = self.judge_files(source, output, bound)
        quantized = {(each.module, each.part, each.expert) for each in map(self.truth.__getitem__, findings.quantized)}
        problems = judge_loading(
            type(self.model), output, self.truth, quantized, self.reference, bound, EXPERTS, VOCABULARY
        )
        may = {number: matrix.weight.numel() for number, matrix in enumerate(self.truth) if not matrix.stays}
        share = sum(size for number, size in may.items() if number in findings.quantized) / max(1, sum(may.values()))
        notes = [] if not isinstance(self.reference, str) else [f"no logits: {self.reference}"]
        if problems:
            of_source = judge_loading(type(self.model), source, self.truth, (), self.reference, 0, EXPERTS, VOCABULARY)
            if same := {kind for kind, _ in of_source} & {kind for kind, _ in problems}:
                notes.append(f"transformers does no better with the source: {', '.join(sorted(same))}")
            problems = [(kind, example) for kind, example in problems if kind not in same & RUNNING]
        loading = [f"transformers: {line}" for line in _grouped(problems)]
        if findings.wrong:
            return WRONG, [*_grouped(findings.wrong), *loading, *notes], share
        if {kind for kind, _ in problems} & CANNOT_LOAD:
            return NOT_LOADED, [*limits, *loading, *notes], share
        if problems or limits:
            return LIMIT, [*limits, *loading, *notes], share
        return RIGHT, notes, share

    def judge_files(self, source: Path, output: Path, bound: float) -> tuple["Findings", list[str]]:
        """What the files say by themselves: faults, and what is out of transformers' reach."""
        from tests.sweep import file_oracle

        quantization = file_oracle.quantization_of(output)
        if quantization is None:
            return file_oracle.Findings([("nothing quantized", str(output))]), []
        before, after = file_oracle.read_tensors(source), file_oracle.read_tensors(output)
        findings = file_oracle.judge(before, after, quantization, self.truth, bound)
        return findings, file_oracle.judge_targets(self.model, quantization, self.truth, before, findings)


def _grouped(faults: list[tuple[str, str]]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for kind, example in faults:
        kinds.setdefault(kind, []).append(example)
    return [f"{kind} ({len(examples)}): {examples[0]}" for kind, examples in kinds.items()]


def _told(error: BaseException) -> list[str]:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return [f"{type(error).__name__}: {str(error)[:300]}", f"{Path(frame.filename).name}:{frame.lineno}"]


def main_json(row: Row, path: Path) -> None:
    """Writes the verdicts on a row to a file."""
    path.write_text(json.dumps(judge(row)))
