"""Comparing weights, as an engine dequantizes them, with the checkpoint that they were made from.

Every fused group is dequantized after the engine's own merge of scales: vLLM keeps the largest NVFP4 divisor of a
group, and for an expert the gate's. So a group with unshared scales shows the error that will be served, not the small
error that each tensor has by itself.

This is the only module of the package that reads weights: one module at a time, a few thousand rows at a time.
"""

import math
import statistics
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from amaxbridge.export.architectures.facts import Architecture, Guess
from amaxbridge.export.disk.packed_experts import PackedSource
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.progress import Progress
from amaxbridge.export.verify.checkpoint_view import CheckpointView, Module
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.export.verify.name_rules import is_expert
from amaxbridge.mappings.errors import CheckpointError, MappingError
from amaxbridge.mappings.fused_groups import groups_among

_ROWS = 4096  # read at a time; a multiple of every block's height
_CLIPPED = 1e-3
_BOUNDS: Mapping[int, float] = {4: 0.25, 8: 0.06}  # by bits of a code; about twice the error of Gaussian weights
_LARGE_FACTOR = 1.25


@dataclass(frozen=True, slots=True)
class WeightError:
    """The difference between a module's weight, as an engine dequantizes it, and the reference.

    Args:
        module: name of the module.
        scheme: name of the scheme.
        bits: bits of a code.
        error: |w - dequantized| / |w|.
        swapped: the same error with the two codes of each byte exchanged; NaN if a byte holds one code.
        factor: the factor by which the dequantized weight would be nearest to the reference.
        clipped: share of weights beyond the largest value that NVFP4's scale can represent; 0 for other formats.
        largest: largest absolute weight of the reference.
    """

    module: str
    scheme: str
    bits: int
    error: float
    swapped: float
    factor: float
    clipped: float
    largest: float

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB."""
        return -20 * math.log10(self.error) if self.error > 0 else math.inf


class ErrorSummary(NamedTuple):
    """The errors of several weights, such as those of one projection over all layers and experts.

    Args:
        projection: what they have in common: name without numbers.
        scheme: names of their schemes.
        modules: how many weights there are.
        mean_snr: mean signal-to-noise ratio of those that are not exact, in dB; infinite if all are.
        worst: the weight with the largest error, which has the lowest signal-to-noise ratio.
    """

    projection: str
    scheme: str
    modules: int
    mean_snr: float
    worst: WeightError

    @classmethod
    def of(cls, errors: Sequence[WeightError], projection: str = "") -> Self:
        snr = [each.snr for each in errors if math.isfinite(each.snr)]
        scheme = "+".join(dict.fromkeys(each.scheme for each in errors))
        mean = statistics.fmean(snr) if snr else math.inf
        return cls(projection, scheme, len(errors), mean, max(errors, key=lambda each: each.error))


class Reference:
    """A checkpoint with the weights before quantization, under the same names; its experts may be packed.

    Args:
        directory: directory of the reference.
        knowledge: what is known of the architecture: how its files pack experts.
    """

    def __init__(self, directory: Path, knowledge: Architecture | Guess) -> None:
        self._knowledge = knowledge
        self._checkpoint = SafetensorsCheckpoint(directory, lambda name: self._experts.get(name))

    @cached_property
    def _experts(self) -> Mapping[str, PackedSource]:
        return _experts_in(self.shapes, self._knowledge.with_axes_of(self.shapes))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; GPT-OSS's MXFP4 as the weights that it encodes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, stored in self._checkpoint.tensors.items():
            if name.endswith("_blocks") and len(stored.spec.shape) == 4:
                experts, rows, blocks, _ = stored.spec.shape
                plain = (rows, blocks * 32)
                packed = name.removesuffix("_blocks")
                turned = self._knowledge.layout_of(packed).transposed
                shapes[packed] = (experts, *(plain[::-1] if turned else plain))
            elif not (
                name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in self._checkpoint.tensors
            ):
                shapes[name] = stored.spec.shape
        return shapes

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file changed since it was opened."""
        self._checkpoint.check_unchanged()

    def errors(self, view: CheckpointView, progress: Progress) -> Iterator[WeightError]:
        """Measures every quantized module that can be dequantized and that the reference has."""
        modules = {module.name: module for module in view.quantized if _is_whole(view, module)}
        sizes = {name: 2 * math.prod(module.shape or ()) for name, module in modules.items()}
        progress.begin(tensors=len(sizes), nbytes=sum(sizes.values()))
        for group in groups_among(modules):
            members = [modules[name] for name in group.members]
            for module in members:
                weight = self._read(module)
                if weight is not None:
                    yield _measure(module, weight, _merged_scale(members, view))
                progress.advance(tensors=1, nbytes=sizes[module.name])

    def _read(self, module: Module) -> Tensor | None:
        try:
            weight = self._checkpoint.read(f"{module.name}.weight")
        except CheckpointError:  # another rule reports that the model has no such tensor
            return None
        return weight if tuple(weight.shape) == module.shape else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._checkpoint.close()


def _experts_in(shapes: Mapping[str, tuple[int, ...]], knowledge: Architecture | Guess) -> dict[str, PackedSource]:
    """The single experts that these tensors pack, by name."""
    return {
        single: source for name, shape in shapes.items() for single, source in knowledge.experts_in(name, shape).items()
    }


def one_by_one(
    shapes: Mapping[str, tuple[int, ...]], held: Container[str], knowledge: Architecture | Guess
) -> dict[str, tuple[int, ...]]:
    """Names and shapes, with packed experts split into single ones unless `held` has them packed, too."""
    packed = {name: shape for name, shape in shapes.items() if name not in held}
    with suppress(MappingError):  # sizes that do not tell the order of axes are those of single experts in either
        knowledge = knowledge.with_axes_of(packed)
    experts = _experts_in(packed, knowledge)
    split = {source.name for source in experts.values()}
    single = {name: shape for name, shape in shapes.items() if name not in split}
    for name, source in experts.items():
        part = torch.empty(shapes[source.name][1:], device="meta")
        single[name] = tuple(source.cut(part).shape)
    return single


def error_rules(errors: list[WeightError]) -> tuple[Rule, ...]:
    """The rules about measured errors."""

    def too_large(view: CheckpointView) -> Iterator[Problem]:
        for each in errors:
            if not each.error <= _BOUNDS[each.bits]:
                yield Problem(f"{each.module}.weight", f"differs by {each.error:.3g} of its norm{_reason(each)}")

    def clipped(view: CheckpointView) -> Iterator[Problem]:
        for each in errors:
            if each.clipped > _CLIPPED:
                yield Problem(
                    f"{each.module}.weight", f"{each.clipped:.2%} of the weights are beyond the scale's range"
                )

    return (
        Rule(
            "weight-error",
            "weights, dequantized as an engine does it, are near the reference",
            "loads in silence: the model answers worse, or nonsense",
            "See the other findings for scales; if there are none, the weights are of another model or step",
            too_large,
        ),
        Rule(
            "saturation",
            "weights lie in the range of their scale",
            "serves, with the largest weights cut off",
            "The amax is smaller than the weights: collect it again after the last step of training",
            clipped,
            Severity.WARNING,
        ),
    )


def _reason(each: WeightError) -> str:
    if each.swapped <= _BOUNDS[each.bits]:
        return f", by {each.swapped:.3g} with the codes of each byte exchanged: nibbles are in the wrong order"
    if each.factor > _LARGE_FACTOR or 0 < each.factor < 1 / _LARGE_FACTOR:
        return f"; it is nearest at {each.factor:.4g} times: a scale is wrong, or not shared"
    return ""


def _is_whole(view: CheckpointView, module: Module) -> bool:
    """True if all tensors that dequantizing needs are there, with the right dtypes and shapes, and a usable scale."""
    if module.group_scale is not None:
        name = f"{module.name}.{module.group_scale.tensor}"
        if name in view.numbers and not 0 < view.numbers[name] < math.inf:
            return False  # a rule of its own says so
    needed = {suffix: specs for suffix, specs in view.planned(module).items() if not suffix.startswith("input")}
    return bool(needed) and all(
        suffix in module.tensors and module.tensors[suffix].spec in specs for suffix, specs in needed.items()
    )


def _merged_scale(members: list[Module], view: CheckpointView) -> float | None:
    """The divisor that vLLM uses for all members of a fused group; None in formats that multiply."""
    scales = {module.name: module.group_scale for module in members}
    divisors = [view.numbers[f"{name}.{scale.tensor}"] for name, scale in scales.items() if scale and scale.is_divisor]
    if not divisors:
        return None
    return divisors[0] if is_expert(members[0].name) else max(divisors)


def _measure(module: Module, weight: Tensor, divisor: float | None) -> WeightError:
    """Sums over parts of the rows, in fp64: |w|², |d|², w·d, |w - d|², |w - d swapped|², clipped."""
    scheme = module.scheme
    assert scheme is not None and module.shape is not None
    has_nibbles = scheme.bits == 4
    sums, largest = torch.zeros(6, dtype=torch.float64), 0.0
    for first in range(0, len(weight), _ROWS):
        rows = weight[first : first + _ROWS].float()
        largest = max(largest, float(rows.abs().max()))
        tensors = _rows_of(module, first, len(rows), divisor)
        found = scheme.dequantize(tensors).float()
        swapped = torch.tensor(math.nan)
        if has_nibbles:
            codes = tensors[scheme.codes].view(torch.uint8)
            exchanged = ((codes << 4) | (codes >> 4)).view(tensors[scheme.codes].dtype)
            swapped = scheme.dequantize({**tensors, scheme.codes: exchanged}).float()
        beyond = torch.tensor(0)
        if divisor is not None and module.group_scale is not None:
            beyond = (rows.abs() > 1.01 * module.group_scale.implied(divisor)).sum()
        sums += torch.stack(
            [each.double() for each in (
                rows.square().sum(), found.square().sum(), (rows * found).sum(), (rows - found).square().sum(),
                (rows - swapped).square().sum(), beyond,
            )]
        )  # fmt: skip
    norm, own, product, error, exchanged_error, beyond = sums.tolist()
    return WeightError(
        module.name,
        scheme.name,
        scheme.bits,
        _ratio(error, norm),
        _ratio(exchanged_error, norm),
        product / own if own else math.nan,
        beyond / max(weight.numel(), 1),
        largest,
    )


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else (math.inf if error else 0.0)


def _rows_of(module: Module, first: int, count: int, divisor: float | None) -> dict[str, Tensor]:
    """What some rows of the weight are stored as."""
    assert module.shape is not None and module.scheme is not None
    total, columns = module.shape
    tensors: dict[str, Tensor] = {}
    for suffix, stored in module.tensors.items():
        if suffix == "weight_shape":
            tensors[suffix] = torch.tensor([count, columns])
        elif divisor is not None and module.group_scale is not None and suffix == module.group_scale.tensor:
            tensors[suffix] = torch.tensor([divisor])
        elif suffix.startswith("weight"):
            length = stored.spec.shape[0] if stored.spec.shape else 1
            step = 1 if length == total else module.scheme.row_step
            whole = not stored.spec.shape or (length == 1 and total > 1 and step * length < total)
            tensors[suffix] = stored.read() if whole else stored.rows(first // step, -(-count // step)).read()
    return tensors
