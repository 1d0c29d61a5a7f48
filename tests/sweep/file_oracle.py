"""Judges a quantized directory by its tensors: compressed-tensors decompresses them, and their rows are looked up.

A quantized module is right if each of its rows, decompressed, is a row of a matrix of the original model within the
scheme's error, in order. Names are not trusted: a random model's rows are all distinct, so the values say which matrix
a row belongs to.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.sweep.true_matrices import Matrix

SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "input_scale",
    "input_global_scale",
)
# Relative error of a row: typical of a random row, with some room.
BOUNDS = {"fp8_dynamic": 0.05, "nvfp4a16": 0.16}


@dataclass(slots=True)
class Findings:
    """What the oracle saw. Each entry of `wrong` is one fault, `kind: example`."""

    wrong: list[tuple[str, str]] = field(default_factory=list)
    quantized: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # matrix → rows
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str) -> None:
        self.wrong.append((kind, example))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def quantization_of(directory: Path) -> Any:
    """compressed-tensors' own reading of the config; None if nothing is quantized."""
    from compressed_tensors.quantization import QuantizationConfig

    raw = json.loads((directory / "config.json").read_text()).get("quantization_config")
    return None if raw is None else QuantizationConfig.model_validate(raw)


class RowIndex:
    """Finds rows of matrices by their values."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = matrices
        by_values: dict[tuple[Any, bytes], list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            by_values[matrix.weight.shape, _bytes(matrix.weight).tobytes()].append(index)
        self.tied = {index: tied for tied in by_values.values() for index in tied}
        groups: dict[int, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            groups[matrix.weight.shape[1]].append(index)
        self._units: dict[int, Tensor] = {}
        self._owners: dict[int, tuple[Tensor, Tensor]] = {}
        for width, members in groups.items():
            rows = torch.cat([matrices[each].weight.float() for each in members])
            self._units[width] = torch.nn.functional.normalize(rows, dim=1)
            owners = [torch.full((len(matrices[each].weight),), each) for each in members]
            numbers = [torch.arange(len(matrices[each].weight)) for each in members]
            self._owners[width] = torch.cat(owners), torch.cat(numbers)

    def find(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """For each row its matrix, its number in it, and its error relative to it; None if no matrix is as wide."""
        if rows.shape[1] not in self._units:
            return None
        units, (owners, numbers) = self._units[rows.shape[1]], self._owners[rows.shape[1]]
        # The first row shows where a whole matrix lies; only what does not lie so is looked up row by row.
        best = self._best(rows[:1], units)
        first = int(best[0])
        if first + len(rows) <= len(units):
            span = torch.arange(first, first + len(rows))
            errors = self._errors(rows, owners[span], numbers[span])
            if errors.max() < 0.5:
                best = span
                return owners[best], numbers[best], errors
        best = self._best(rows, units)
        return owners[best], numbers[best], self._errors(rows, owners[best], numbers[best])

    @staticmethod
    def _best(rows: Tensor, units: Tensor) -> Tensor:
        return (torch.nn.functional.normalize(rows.float(), dim=1) @ units.t()).argmax(dim=1)

    def _errors(self, rows: Tensor, owners: Tensor, numbers: Tensor) -> Tensor:
        errors = torch.empty(len(rows))
        for owner in owners.unique().tolist():
            at = (owners == owner).nonzero()[:, 0]
            truth = self.matrices[owner].weight.float()[numbers[at]]
            errors[at] = (rows[at].float() - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-12)
        return errors


def judge(
    source: Mapping[str, Tensor],
    output: Mapping[str, Tensor],
    quantization: Any,
    matrices: Sequence[Matrix],
    bound: float,
) -> Findings:
    """Holds the output's tensors against the source's and against the model's matrices."""
    findings = Findings()
    index = RowIndex(matrices)
    modules = sorted({name.rpartition(".")[0] for name in output if name.endswith((".weight_scale", ".weight_packed"))})
    used: set[str] = set()
    for module in modules:
        local = {suffix: f"{module}.{suffix}" for suffix in ("weight", *SUFFIXES) if f"{module}.{suffix}" in output}
        used.update(local.values())
        weight = decompress(module, {suffix: output[name] for suffix, name in local.items()}, quantization)
        _judge_module(module, weight, output.get(f"{module}.bias"), source, index, bound, findings)
    _judge_sources(source, output, used, index, findings)
    for number, rows in findings.quantized.items():
        matrix = matrices[number]
        if matrix.stays:
            findings.add(f"{matrix.stays} quantized", matrix.name)
        elif len(rows) < len(matrix.weight):
            findings.add("a part of a matrix quantized", f"{matrix.name}: {len(rows)} of {len(matrix.weight)} rows")
    return findings


def decompress(module: str, local: Mapping[str, Tensor], quantization: Any) -> Tensor:
    """A module's weight, by compressed-tensors' own function."""
    from compressed_tensors.compressors import BaseCompressor

    groups = list(quantization.config_groups.values())
    scheme = groups[0]
    if len(groups) > 1:
        from compressed_tensors.utils.match import is_match

        linear = nn.Linear(1, 1)
        scheme = next(group for group in groups if is_match(module, linear, group.targets))
    compressor = BaseCompressor.get_value_from_registry(scheme.format or quantization.format)
    weight: Tensor = compressor.decompress(dict(local), scheme)["weight"]
    return weight


def _judge_module(
    module: str,
    weight: Tensor,
    bias: Tensor | None,
    source: Mapping[str, Tensor],
    index: RowIndex,
    bound: float,
    findings: Findings,
) -> None:
    found = index.find(weight)
    if found is None:
        findings.add("no matrix has this input dim", f"{module} {list(weight.shape)}")
        return
    owners, numbers, errors = found
    if not bool((errors < bound).all()):
        worst = float(errors.max())
        kind = "wrong values" if bool(errors.median() < 0.5) else "rows are no rows of the model (wrong axis)"
        findings.add(kind, f"{module} {list(weight.shape)}: error {worst:.2f}")
        return
    names = []
    for owner in dict.fromkeys(owners.tolist()):
        matrix = index.matrices[owner]
        at = owners == owner
        for tied in index.tied[owner]:
            findings.quantized[tied].update(numbers[at].tolist())
        names.append(matrix)
        if bias is not None and matrix.bias is not None and not torch.equal(bias[at], matrix.bias[numbers[at]]):
            findings.add("bias of other rows", module)
    origin = source.get(f"{module}.weight")
    if origin is None:
        _judge_new_name(module, names, findings)
    elif not any(_near(weight, each, bound) for each in (origin, origin.transpose(-1, -2))):
        findings.add("weight of another module", f"{module} is {names[0].name}")


def _near(weight: Tensor, other: Tensor, bound: float) -> bool:
    if weight.shape != other.shape:
        return False
    return float((weight.float() - other.float()).norm() / other.float().norm().clamp(min=1e-12)) < bound


_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def _judge_new_name(module: str, found: Sequence[Matrix], findings: Findings) -> None:
    """A module that the source does not have: an expert that was cut out. Its number and part must be its name's."""
    leaf = module.rpartition(".")[2]
    numbers = re.findall(r"\.(\d+)(?=\.|$)", module)
    if len(found) != 1:
        findings.add("new name for several matrices", f"{module}: {[each.name for each in found[:3]]}")
        return
    matrix = found[0]
    if matrix.expert is not None and (not numbers or int(numbers[-1]) != matrix.expert):
        findings.add("expert under another's number", f"{module} is {matrix.name}")
    if matrix.part in ("gate", "up", "down") and _PARTS.get(leaf, matrix.part) != matrix.part:
        findings.add("gate, up and down exchanged", f"{module} is {matrix.name}")


def _judge_sources(
    source: Mapping[str, Tensor], output: Mapping[str, Tensor], used: set[str], index: RowIndex, findings: Findings
) -> None:
    """Every source tensor is in the output, bit by bit, or is what quantized modules are made of."""
    rows = {
        row.tobytes(): (number, line)
        for number, matrix in enumerate(index.matrices)
        for line, row in enumerate(_bytes(matrix.weight))
    }
    fresh = {name: tensor for name, tensor in output.items() if name not in source and name not in used}
    for name, tensor in source.items():
        if name in output and name not in used:
            if output[name].dtype != tensor.dtype or output[name].shape != tensor.shape:
                findings.add("unquantized tensor changed", f"{name}: {tensor.dtype} {output[name].dtype}")
            elif not torch.equal(_raw(output[name]), _raw(tensor)):
                findings.add("unquantized tensor changed", name)
        elif (tensor.dim() >= 2 and _is_quantized(tensor, rows, findings)) or _is_among(tensor, fresh):
            continue
        else:
            findings.add("source tensor lost", f"{name} {list(tensor.shape)}")
    everything = [tensor for name, tensor in source.items() if name not in output]
    for name, tensor in fresh.items():
        if not any(_is_among(tensor, {"": each}) for each in everything):
            findings.add("tensor that the source does not have", f"{name} {list(tensor.shape)}")


def _bytes(weight: Tensor) -> Any:
    return weight.contiguous().view(torch.int16).numpy() if weight.element_size() == 2 else weight.contiguous().numpy()


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _is_quantized(tensor: Tensor, rows: Mapping[bytes, tuple[int, int]], findings: Findings) -> bool:
    """True if the tensor, or its transpose along the last two dims, is made of rows of quantized matrices."""
    for view in (tensor, tensor.transpose(-1, -2)):
        flat = view.reshape(-1, view.shape[-1])
        places = [rows.get(row.tobytes()) for row in _bytes(flat)]
        if places and all(place is not None and place[1] in findings.quantized.get(place[0], ()) for place in places):
            return True
    return False


def _is_among(tensor: Tensor, others: Mapping[str, Tensor]) -> bool:
    """True if every value of the tensor is a value of the others together."""
    values = {*()}
    for other in others.values():
        if other.dtype == tensor.dtype:
            values.update(_raw_values(other))
    return bool(values) and all(value in values for value in _raw_values(tensor))


def _raw_values(tensor: Tensor) -> list[Any]:
    flat: list[Any] = tensor.float().flatten().tolist() if tensor.is_floating_point() else tensor.flatten().tolist()
    return flat


def judge_targets(
    model: nn.Module, quantization: Any, matrices: Sequence[Matrix], source: Iterable[str], findings: Findings
) -> list[str]:
    """Holds the modules that `targets` and `ignore` mean in transformers' tree against the modules that are quantized.

    Returns what is right in the files and yet out of transformers' reach.
    """
    from compressed_tensors.utils.match import is_match, match_named_modules

    targets = [target for group in quantization.config_groups.values() for target in group.targets]
    targeted = {name for name, _ in match_named_modules(model, targets, quantization.ignore)}
    limits = []
    quantized = {matrices[number].module for number in findings.quantized if matrices[number].kind == "linear"}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in sorted(targeted & linears - quantized):
        head = [each for each in matrices if each.module == name and each.stays]
        kind = head[0].stays if head else "linear"
        findings.add(f"{kind} targeted in transformers' tree, and unquantized", name)
    for name in sorted(quantized - targeted):
        findings.add("quantized, and not targeted in transformers' tree", name)
    for number in findings.quantized:
        if matrices[number].kind == "conv1d":
            limits.append(f"Conv1D is no target of compressed-tensors: {matrices[number].module}")
            break
    spellings = _file_spellings(source)
    linear = nn.Linear(1, 1)
    for number, matrix in enumerate(matrices):
        if matrix.kind != "expert" or matrix.stays or number in findings.quantized:
            continue
        names = {matrix.module} | {
            each for each in spellings if each.rpartition(".")[2] == matrix.module.rpartition(".")[2]
        }
        candidates = [f"{name}{suffix}" for name in names for suffix in ("", f".{matrix.expert}.{matrix.part}_proj")]
        if all(
            is_match(each, linear, targets) and not is_match(each, linear, quantization.ignore) for each in candidates
        ):
            findings.add("experts unquantized, and not in ignore", matrix.name)
    return limits


def _file_spellings(source: Iterable[str]) -> set[str]:
    spellings = set()
    for name in source:
        parts = name.split(".")
        spellings.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return spellings
