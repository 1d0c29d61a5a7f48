"""The bundles of a checkpoint's files, which can be quantized one by one: the reading side of `model_free`.

Only headers are read here. Packed experts are split into the weights of each expert, which are rows of the packed
tensor in the file. With a converter, the tensors of a bundle are read and converted when its turn comes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from amaxbridge.export.disk.packed_experts import PackedSource, sources_in
from amaxbridge.export.disk.row_chunks import Part, Rows, WholeTensor
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.model_free.inverse_weight_maps import Converter, InverseWeightMap, tensors_together
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.family import PackedExperts
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec


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
class PackedRows:
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
    converters: Sequence[Converter] = (),
    packed: PackedExperts | None = None,
) -> list[SourceBundle]:
    """Lists the bundles of these output files.

    Args:
        maps: output file → what it is made from.
        files: path → the opened file.
        packed: layout of packed experts to split; None to keep them packed.

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
        bundles += _converted(output, stored, converters) if converters else _stored(output, stored, packed)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing:{listing(missing)}")
    return bundles


def _stored(output: str, stored: Mapping[str, StoredTensor], packed: PackedExperts | None) -> Iterator[SourceBundle]:
    """Each fused group of an output file, and each other tensor."""
    together: dict[str, dict[str, Rows]] = {}
    for name, tensor in stored.items():
        for single, rows in _experts(name, tensor, packed).items():
            is_weight = single.endswith(".weight")
            key = group_of(module_of(single)).primary + ".weight" if is_weight else single
            together.setdefault(key, {})[single] = rows
    for key, rows_of in together.items():
        specs = {name: rows.spec for name, rows in rows_of.items()}
        yield SourceBundle(key, output, specs, partial(dict, rows_of))


def _experts(name: str, tensor: StoredTensor, packed: PackedExperts | None) -> dict[str, Rows]:
    """A tensor by name, or the single weights that are packed in it, by theirs."""
    found = sources_in(name, tensor.spec.shape, packed) if packed else {}
    return {single: _rows_of(tensor, source) for single, source in found.items()} or {name: tensor}


def _rows_of(tensor: StoredTensor, source: PackedSource) -> Rows:
    part = tensor.row(source.expert)
    if source.layout != PackedExperts():
        return PackedRows(part, source)
    if source.half is None:
        return part
    count = part.spec.shape[0] // 2
    return part.rows(source.half * count, count)


def _converted(
    output: str, stored: Mapping[str, StoredTensor], converters: Sequence[Converter]
) -> Iterator[SourceBundle]:
    for names in tensors_together(stored, converters):
        tensors = {name: stored[name] for name in names}
        try:
            made = _convert({name: tensor.spec.meta() for name, tensor in tensors.items()}, converters, check=True)
        except Exception as error:  # a converter may raise anything on tensors that it is not for
            raise CheckpointError(f"the converter refuses{listing(names)}\n{error}") from error
        specs = {name: TensorSpec.of(tensor) for name, tensor in made.items()}
        yield SourceBundle(names[0], output, specs, partial(_load_converted, tensors, converters))


def _load_converted(tensors: Mapping[str, StoredTensor], converters: Sequence[Converter]) -> dict[str, Rows]:
    made = _convert({name: tensor.read() for name, tensor in tensors.items()}, converters, check=False)
    return {name: WholeTensor(tensor.contiguous()) for name, tensor in made.items()}


def _convert(tensors: dict[str, Tensor], converters: Sequence[Converter], *, check: bool) -> dict[str, Tensor]:
    for converter in converters:
        tensors = (converter.validate if check else converter.process)(tensors)
    return tensors
