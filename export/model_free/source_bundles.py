"""The bundles of a checkpoint's files, which can be quantized one by one: the reading side of `model_free`.

Only headers are read here. Packed experts are split into the weights of each expert, which are rows of the packed
tensor in the file; that comes before any converter. Quantized modules are converted, and the converters of others run,
when a bundle's turn comes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from amaxbridge.export.disk.packed_experts import PackedSource
from amaxbridge.export.disk.row_chunks import Part, Rows, WholeTensor
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.model_free.converters.chain import ConverterChain
from amaxbridge.export.model_free.converters.conversion import Conversion, PackedRows, check_made
from amaxbridge.export.model_free.converters.quantized_source import cut_tensor
from amaxbridge.export.model_free.inverse_weight_maps import InverseWeightMap, tensors_together
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.family import PackedExperts
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec

_NUMBERS = ("weight_scale", "weight_global_scale", "input_scale", "input_global_scale", ".k_scale", ".v_scale")
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

type ExpertsIn = Callable[[str, tuple[int, ...]], Mapping[str, PackedSource]]


@dataclass(frozen=True, slots=True)
class SourceBundle:
    """Tensors of one output file that are made together: a fused group, or one tensor.

    Args:
        key: the primary module, or the tensor's name; the same in every run.
        output: the file that the result goes to.
        specs: the tensors by Hugging Face name.
        load: returns the tensors; they are read when their rows are asked for.
    """

    key: str
    output: str
    specs: Mapping[str, TensorSpec]
    load: Callable[[], Mapping[str, Rows]]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """One expert's weight in a packed tensor that must be transposed or de-interleaved before it has rows."""

    part: StoredTensor
    source: PackedSource

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec.of(self.source.cut(self.part.spec.meta()))

    def parts(self, step: int = 1, *, again: bool = False) -> Iterator[Part]:
        yield Part(0, self.source.cut(self.part.read()).contiguous())


def read_bundles(
    maps: Mapping[str, InverseWeightMap],
    files: Mapping[str, SafetensorsFile],
    *,
    conversion: Conversion | None = None,
    chain: ConverterChain | None = None,
    experts: ExpertsIn | None = None,
) -> list[SourceBundle]:
    """Lists the bundles of these output files.

    Args:
        maps: output file → what it is made from.
        files: path → the opened file.
        conversion: what becomes of the source's quantized modules; None if it has none.
        chain: converters of others, in place of `conversion`.
        experts: the single experts in a tensor, by its name and shape; None to keep packed experts packed.

    Raises:
        CheckpointError: files lack tensors that the maps name; all of them are named. Or a converter refuses its input.
        ValueError: packed experts that do not divide into gate and up.
    """
    bundles: list[SourceBundle] = []
    missing = []
    for output, wanted in maps.items():
        stored: dict[str, StoredTensor] = {}
        for path, names in wanted.items():
            held = files[path].tensors
            missing += [f"{name}: not in {path}" for name in names if name not in held]
            stored |= {name: held[name] for name in names if name in held}
        bundles += (
            _converted(output, stored, chain, experts) if chain else bundles_of(output, stored, experts, conversion)
        )
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing:{listing(missing)}")
    return bundles


@dataclass(slots=True)
class _Together:
    """What one bundle is made from: tensors that are taken as they are, and quantized modules by local name."""

    rows: dict[str, Rows] = field(default_factory=dict)
    modules: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)

    def bundle(self, key: str, output: str, conversion: Conversion | None) -> SourceBundle:
        specs = {name: rows.spec for name, rows in self.rows.items()}
        if conversion is None or not self.modules:
            return SourceBundle(key, output, specs, partial(dict, self.rows))
        for module in self.modules:
            specs |= conversion.specs(module)
        return SourceBundle(key, output, specs, partial(self._load, conversion))

    def _load(self, conversion: Conversion) -> Mapping[str, Rows]:
        made: dict[str, Rows] = dict(self.rows)
        for module, stored in self.modules.items():
            names = conversion.source.weights[module].names
            tensors = conversion.convert(module, {name: stored[name].read() for name in names})
            check_made(tensors, conversion.specs(module))
            made |= {name: WholeTensor(tensor) for name, tensor in tensors.items()}
        return made


def bundles_of(
    output: str, stored: Mapping[str, StoredTensor], experts: ExpertsIn | None, conversion: Conversion | None
) -> Iterator[SourceBundle]:
    """Each fused group of an output file, and each other tensor; see `read_bundles`."""
    together: dict[str, _Together] = {}
    packed: dict[str, list[tuple[str, Mapping[str, StoredTensor]]]] = {}  # packed name → what is dequantized into it
    plain, modules = _quantized_modules(stored, conversion)
    for name, tensor in plain.items():
        for single, rows in _experts(name, tensor, experts).items():
            key = _key(single) if single.endswith(".weight") else single
            together.setdefault(key, _Together()).rows[single] = rows
    for module, local in modules.items():
        assert conversion is not None
        packed_name = conversion.packed_name(module) if experts is None else None
        if packed_name is not None:
            packed.setdefault(packed_name, []).append((module, local))
        else:
            key = _key(f"{next(iter(conversion.modules_of(module)))}.weight")
            together.setdefault(key, _Together()).modules[module] = local
    for name, members in packed.items():
        assert conversion is not None
        together[name] = _Together(rows={name: PackedRows(conversion, tuple(members))})
    for key, each in together.items():
        yield each.bundle(key, output, conversion)


def _key(weight: str) -> str:
    return group_of(module_of(weight)).primary + ".weight"


def _quantized_modules(
    stored: Mapping[str, StoredTensor], conversion: Conversion | None
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    """Tensors that are taken as they are, by name; and those of quantized modules, by module and local name."""
    if conversion is None:
        return dict(stored), {}
    plain, modules = dict[str, StoredTensor](), dict[str, dict[str, StoredTensor]]()
    for name, tensor in stored.items():
        for single, part in cut_tensor(name, tensor).items():
            module, _, local = single.rpartition(".")
            weight = conversion.source.weights.get(module)
            if weight is not None and local in weight.names:
                modules.setdefault(module, {})[local] = part
            else:
                name_beside, rows = conversion.beside(single, part)
                plain[name_beside] = rows
    return plain, modules


def _experts(name: str, tensor: StoredTensor, experts: ExpertsIn | None) -> dict[str, Rows]:
    """A tensor by name, or the single weights that are packed in it, by theirs."""
    found = experts(name, tensor.spec.shape) if experts else {}
    return {single: _rows_of(tensor, source) for single, source in found.items()} or {name: tensor}


def _rows_of(tensor: StoredTensor, source: PackedSource) -> Rows:
    part = tensor.row(source.expert)
    if source.layout != PackedExperts():
        return ExpertRows(part, source)
    if source.half is None:
        return part
    count = part.spec.shape[0] // 2
    return part.rows(source.half * count, count)


def _converted(
    output: str, stored: Mapping[str, StoredTensor], chain: ConverterChain, experts: ExpertsIn | None
) -> Iterator[SourceBundle]:
    """What the converters of others make together. Packed experts are split before them, and those they make, after."""
    rows: dict[str, Rows] = {}
    for name, tensor in stored.items():
        rows |= _experts(name, tensor, experts if tensor.spec.dtype in _PLAIN else None)
    for names in tensors_together(rows, chain.converters):
        given = {name: rows[name] for name in names}
        made = chain.plan({name: each.spec for name, each in given.items()}, partial(_read, given))
        specs = {name: TensorSpec.of(each) for name, each in _finished(_on_meta(made), experts).items()}
        if specs:  # a converter may drop tensors
            yield SourceBundle(names[0], output, specs, partial(_load_converted, given, chain, made, experts))


def _load_converted(
    given: Mapping[str, Rows], chain: ConverterChain, planned: Mapping[str, TensorSpec], experts: ExpertsIn | None
) -> dict[str, Rows]:
    made = chain.process(_read(given))
    check_made(made, planned)
    return {name: WholeTensor(tensor.contiguous()) for name, tensor in _finished(made, experts).items()}


def _read(given: Mapping[str, Rows]) -> dict[str, Tensor]:
    return {name: each.read() if isinstance(each, StoredTensor) else _whole(each) for name, each in given.items()}


def _whole(rows: Rows) -> Tensor:
    parts = [part.rows for part in rows.parts()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on_meta(specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    return {name: spec.meta() for name, spec in specs.items()}


def _finished(tensors: Mapping[str, Tensor], experts: ExpertsIn | None) -> dict[str, Tensor]:
    """What converters made: packed experts are split, and scales of one number have the dim that engines expect."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = experts(name, tuple(tensor.shape)) if experts and tensor.dtype in _PLAIN else {}
        whole = tensor.reshape(1) if name.endswith(_NUMBERS) and not tensor.shape else tensor
        split |= {single: source.cut(tensor[source.expert]) for single, source in found.items()} or {name: whole}
    return split
