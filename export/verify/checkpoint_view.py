"""A checkpoint as the rules see it: opened once, read-only.

Headers, index and config.json are read at the beginning; what is broken in them becomes a problem that a rule reports,
not an exception, so that one damaged file does not hide what else is wrong. Scales are read when a rule asks, single
numbers in runs and larger ones in the file's own memory, each once. Weights are read by the rules that have a
reference, and by no others.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import torch

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.architectures.facts import GUESS, Architecture, architecture_of
from amaxbridge.export.disk.io_errors import changed_meanwhile, explaining_reads
from amaxbridge.export.disk.open_files import OpenFiles
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.disk.strict_json import misfit, read_json_object
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.modelopt_config import HF_QUANT_CONFIG_FILE
from amaxbridge.export.output.config_and_index import CONFIG_FILE, INDEX_FILE, QUANT_STATE_FILE
from amaxbridge.export.quant_config import QuantConfig, read_quant_config
from amaxbridge.export.schemes import MODELOPT_FORMAT, SCHEMES, Scheme, modelopt_schemes
from amaxbridge.export.schemes.stored_specs import stored_specs
from amaxbridge.mappings.config_fields import check_all_fields
from amaxbridge.mappings.errors import AmaxbridgeError, CheckpointError
from amaxbridge.mappings.tensors import TensorSpec

_ANY = TensorSpec((1024, 1024), torch.bfloat16)  # which tensors a scheme writes does not depend on the shape
_STATED = TensorSpec((2,), torch.int64)
_CODES = (torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32)

_ALL = (*SCHEMES.values(), *modelopt_schemes())
INPUT_SCALES: Mapping[str, SharedScale] = MappingProxyType(
    {scheme.input_scale.tensor: scheme.input_scale for scheme in reversed(_ALL) if scheme.input_scale is not None}
)
"""The static input scales that schemes have, by local name."""
GLOBAL_SCALES = frozenset(
    scheme.group_scale.tensor for scheme in _ALL if scheme.group_scale and scheme.group_scale.tensor != "weight_scale"
)
"""The weight scales above block scales, which fused groups share, by local name."""
QUANTIZED_SUFFIXES = frozenset(
    name for scheme in _ALL for name in scheme.tensor_specs(_ANY, Arithmetic.MODELOPT) if name != "weight"
)
"""Local names of the tensors that only quantized modules have."""


class Extent(NamedTuple):
    """The least and the greatest number of a tensor; NaN where it holds one."""

    least: float
    greatest: float


class Place(NamedTuple):
    """A tensor in a file, as its header says."""

    file: str
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class Module:
    """A linear module as the files hold it.

    Args:
        name: full name.
        tensors: by the last part of their names: `weight_packed`, `bias`.
        scheme: what config.json says of the module; None for none, or for one that is not known.
        group: the number of its config group; None for none.
        shape: `[out, in]` of the weight, from its codes; None where they are missing or are no matrix.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    scheme: Scheme | None
    group: int | None
    shape: tuple[int, int] | None

    @property
    def is_quantized(self) -> bool:
        """Whether there are scales or packed codes, or codes in place of a weight."""
        weight = self.tensors.get("weight")
        return not QUANTIZED_SUFFIXES.isdisjoint(self.tensors) or (weight is not None and weight.spec.dtype in _CODES)

    @property
    def group_scale(self) -> SharedScale | None:
        """The weight scale that a fused group shares; None in formats without."""
        return None if self.scheme is None else self.scheme.group_scale

    @property
    def input_scale(self) -> SharedScale | None:
        """The input's scale, where the files have one."""
        planned = None if self.scheme is None else self.scheme.input_scale
        if planned is not None and planned.tensor in self.tensors:
            return planned
        return next((scale for suffix, scale in INPUT_SCALES.items() if suffix in self.tensors), None)


class CheckpointView:
    """The checkpoint in a directory, open until the context ends.

    `expected` are the shapes by name of everything the unquantized model has, where that is known; `names`, the files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.expected: Mapping[str, tuple[int, ...]] | None = None
        self.broken: dict[str, str] = {}
        self._plans: dict[tuple[int | None, tuple[int, int]], dict[str, frozenset[TensorSpec]] | str] = {}
        self._made: dict[Callable[[CheckpointView], Any], Any] = {}
        self.files: dict[str, SafetensorsFile] = {}
        self._open_files = OpenFiles()
        with explaining_reads(directory):
            self.names = sorted(os.listdir(directory))
        # quantizer state may lie beside a checkpoint and is no part of it
        weights = [name for name in self.names if name.endswith(".safetensors") and name != QUANT_STATE_FILE]
        for path in (directory / name for name in weights):
            try:
                self.files[path.name] = SafetensorsFile(path, self._open_files, directory)
            except CheckpointError as error:
                if isinstance(error.__cause__, OSError):  # says nothing of the file's content
                    raise
                self.broken[path.name] = str(error)
        self._json = self._read_json()
        (self.config, self.config_problem), (index, self.index_problem) = self._json
        self.index = index if self.index_problem is None else None

    def _read_json(self) -> tuple[tuple[dict[str, Any], str | None], ...]:
        """config.json and the index, each with what is wrong with it."""
        config = _read_json(self.directory / CONFIG_FILE, check_all_fields)
        return config, _read_json(self.directory / INDEX_FILE, _check_index)

    @cached_property
    def places(self) -> list[tuple[str, Place]]:
        """Every tensor of every header; a name comes twice where two files have it."""
        return [(name, Place(file, at)) for file, opened in self.files.items() for name, at in opened.tensors.items()]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """By name; where two files have one, that of the file which the index names."""
        weight_map = self.weight_map
        found = {name: place.stored for name, place in self.places}
        return found | {name: place.stored for name, place in self.places if weight_map.get(name) == place.file}

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """As the index has it; empty without one."""
        found = (self.index or {}).get("weight_map")
        return found if isinstance(found, dict) else {}

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the language model."""
        nested = self.config.get("text_config")
        return {**self.config, **nested} if isinstance(nested, dict) else self.config

    @cached_property
    def quantization(self) -> QuantConfig:
        """What config.json says of quantization, or ModelOpt's file beside it where config.json says nothing.

        Engines look into the language model's part of config.json last, where Kimi-K2.5 says it.
        """
        raw = self.config.get("quantization_config")
        nested = self.config.get("text_config")
        if not raw and isinstance(nested, dict) and "num_hidden_layers" in nested:
            raw = nested.get("quantization_config")
        if not raw and isinstance(said := self.hf_quant_config.get("quantization"), dict):
            raw = {**said, "quant_method": MODELOPT_FORMAT}
        return read_quant_config(raw)

    @cached_property
    def hf_quant_config(self) -> dict[str, Any]:
        """ModelOpt's file beside config.json; empty if there is none, or if it is no JSON."""
        return _read_json(self.directory / HF_QUANT_CONFIG_FILE)[0]

    @cached_property
    def known_architecture(self) -> Architecture | None:
        """What the tables say of the architecture that config.json names; None if they do not have it."""
        return architecture_of(self.config)

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every linear module, quantized or not, by name. Embeddings are none."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        for name, stored in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            parts.setdefault(module, {})[suffix] = stored
        modules: dict[str, Module] = {}
        knowledge = self.known_architecture or GUESS
        for name, tensors in parts.items():
            weight = tensors.get("weight")
            plain = weight is not None and len(weight.spec.shape) == 2 and not knowledge.is_embedding(name)
            if plain or not QUANTIZED_SUFFIXES.isdisjoint(tensors):
                group = self.quantization.group_of(name)
                scheme = None if group is None else self.quantization.groups[group].scheme
                modules[name] = Module(name, tensors, scheme, group, shape_of(tensors, scheme))
        return modules

    @cached_property
    def quantized(self) -> list[Module]:
        """The modules that the files hold quantized."""
        return [module for module in self.modules.values() if module.is_quantized]

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding, and so has no tensor."""
        return bool(self.text_config.get("tie_word_embeddings")) and "lm_head.weight" not in self.tensors

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Every tensor of one fp32 number that is a scale."""
        return dict(_read_numbers(item for item in self.tensors.items() if is_number(*item)))

    @cached_property
    def weight_scales(self) -> dict[str, Extent]:
        """Least and greatest of each module's `weight_scale`; of E8M0, the exponents as bytes."""
        return {
            module.name: extent_of(scale)
            for module in self.quantized
            if (scale := module.tensors.get("weight_scale")) is not None and scale.spec.nbytes
        }

    def planned(self, module: Module) -> dict[str, frozenset[TensorSpec]]:
        """What its scheme writes for a module: last part of the name → the specs that are right.

        There are several because scales have the dtype of the weight, or fp32 where an amax was calibrated. Nothing
        where scheme or shape are not known, or do not fit: see `misfit`.
        """
        found = self._plan(module)
        return {} if isinstance(found, str) else found

    def misfit(self, module: Module) -> str | None:
        """Why the scheme cannot hold a weight of the module's shape."""
        found = self._plan(module)
        return found if isinstance(found, str) else None

    def _plan(self, module: Module) -> dict[str, frozenset[TensorSpec]] | str:
        if module.scheme is None or module.shape is None:
            return {}
        key = module.group, module.shape
        if key not in self._plans:
            try:
                self._plans[key] = stored_specs(module.scheme, module.shape)
            except ValueError as error:
                self._plans[key] = str(error)
        return self._plans[key]

    def once[T](self, make: "Callable[[CheckpointView], T]") -> T:
        """What `make` gives for this checkpoint, made when the first rule needs it."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file changed since the view was made: the rules saw a mixture."""
        for file in self.files.values():
            file.check_unchanged()
        if self._read_json() != self._json:
            raise changed_meanwhile(self.directory / CONFIG_FILE, self.directory / INDEX_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()


def shape_of(tensors: Mapping[str, StoredTensor], scheme: Scheme | None) -> tuple[int, int] | None:
    """Shape `[out, in]` of a module's weight; None if its codes are missing or are no matrix."""
    weight = tensors.get("weight")
    packed = scheme is not None and scheme.codes == "weight" and weight is not None and weight.spec.dtype == torch.uint8
    if weight is not None and len(weight.spec.shape) == 2 and not packed:
        return weight.spec.shape[0], weight.spec.shape[1]
    if scheme is None:
        return None
    specs = {suffix: stored.spec for suffix, stored in tensors.items()}
    found = scheme.weight_shape(specs)
    stated = tensors.get("weight_shape")
    is_open = scheme.blocks.width is None and stated is not None and stated.spec == _STATED
    if found is None or stated is None or not is_open:
        return found
    rows, columns = stated.read().tolist()  # whole rows of packed codes may end within a word
    if rows <= 0 or columns <= 0:
        return found
    right = scheme.tensor_specs(TensorSpec((rows, columns), torch.bfloat16), Arithmetic.MODELOPT)
    return (rows, columns) if right[scheme.codes] == specs[scheme.codes] else found


def is_number(name: str, stored: StoredTensor) -> bool:
    """True for a tensor of one fp32 number that is a scale."""
    is_scale = name.endswith(("_scale", *GLOBAL_SCALES))
    return is_scale and stored.spec.dtype == torch.float32 and stored.spec.nbytes == 4


def _check_index(content: Mapping[str, Any], path: Path) -> None:
    if wrong := misfit(content, {"weight_map": {str: str}, "metadata": ({}, None)}):
        raise CheckpointError(f"{path} is no index: {wrong}")


def _read_json(
    path: Path, check: Callable[[Mapping[str, Any], Path], None] = lambda content, path: None
) -> tuple[dict[str, Any], str | None]:
    """The object in a file, and what is wrong with it."""
    try:
        content = read_json_object(path)
        if content is None:
            return {}, "is not there"
        check(content, path)
    except AmaxbridgeError as error:
        if isinstance(error.__cause__, OSError):  # says nothing of the file's content
            raise
        return {}, str(error)
    return content, None


def _read_numbers(tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[tuple[str, float]]:
    """fp32 numbers. Those that lie side by side, as writers that sort by dtype put them, are read together."""
    run: list[str] = []
    first: StoredTensor | None = None
    for name, stored in sorted(tensors, key=lambda item: (str(item[1].file.path), item[1].begin)):
        if first is None or stored.file is not first.file or stored.begin != first.begin + 4 * len(run):
            yield from _read_run(run, first)
            run, first = [], stored
        run.append(name)
    yield from _read_run(run, first)


def _read_run(names: list[str], first: StoredTensor | None) -> Iterator[tuple[str, float]]:
    if first is not None:
        run = StoredTensor(first.file, first.begin, TensorSpec((len(names),), torch.float32))
        yield from zip(names, run.read().tolist(), strict=True)


def extent_of(stored: StoredTensor) -> Extent:
    """Least and greatest number of a tensor with elements; of E8M0, the exponents as bytes."""
    if stored.spec.dtype == torch.float8_e4m3fn:
        least, greatest = _of_bytes(StoredTensor(stored.file, stored.begin, TensorSpec(stored.spec.shape, torch.uint8)))
        if greatest < 0x7F:  # positive numbers: their bytes have their order
            return Extent(*torch.tensor([least, greatest], dtype=torch.uint8).view(torch.float8_e4m3fn).tolist())
    elif stored.spec.dtype == torch.uint8:
        return Extent(*_of_bytes(stored))
    parts = [rows.float().aminmax() for _, rows in stored.parts()]
    return Extent(*(float(torch.stack(each).aminmax()[at]) for at, each in enumerate(zip(*parts, strict=True))))


def _of_bytes(stored: StoredTensor) -> tuple[int, int]:
    """Least and greatest, by numpy: quick for small tensors. The second pass finds a part in the cache."""
    parts = [(rows.min(), rows.max()) for rows in (part.rows.numpy() for part in stored.parts())]
    return int(min(least for least, _ in parts)), int(max(greatest for _, greatest in parts))
