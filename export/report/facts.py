"""What a report says, as data: gathered from the files of a checkpoint, one tensor at a time.

Without a reference only headers and scales are read: seconds, whatever the size of the model. With one, every quantized
weight is dequantized, as an engine has it, and compared.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checkpoint import SafetensorsCheckpoint
from export.kernels.nvfp4 import FP4_MAX, FP8_MAX
from export.metadata import CONFIG_FILE, CONVERSION_FILE, QUANT_STATE_FILE
from export.quant_state import QuantState
from export.quant_state_file import read_quant_state
from export.report.names import Place, place_of
from export.report.quantization import schemes_of
from export.safetensors_file import StoredTensor
from export.schemes import Scheme
from export.schemes.scaled import Scaled
from mappings.errors import CheckpointError, UnknownArchitectureError, UsageError
from mappings.families import family_of
from mappings.family import PackedExperts
from mappings.names import module_of, natural_key

_NVFP4_RANGE = FP4_MAX * FP8_MAX
_CODES = (torch.float8_e4m3fn, torch.int8)
_PACKED = {torch.uint8: 2, torch.int32: 8}
_ROWS = 4096  # compared at a time
_SATURATED = 1.001  # an amax may have been rounded on its way through a scale

type Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One quantized module.

    Args:
        name: of the module.
        place: layer, projection, expert.
        scheme: its name; "?" for one that is not known here.
        shape: `[out, in]`.
        weight_amax: per-tensor; None where the format shares none.
        input_amax: the same of its input; None where inputs are not calibrated.
        largest: the largest absolute weight in the reference.
        snr: of the dequantized weight against the reference, in dB; infinite where it is exact.
    """

    name: str
    place: Place
    scheme: str
    shape: tuple[int, int]
    weight_amax: float | None = None
    input_amax: float | None = None
    largest: float | None = None
    snr: float | None = None

    @property
    def saturation(self) -> float:
        """How many times its amax the largest weight is; 0 where it is not known."""
        return self.largest / self.weight_amax if self.largest and self.weight_amax else 0.0

    @property
    def is_saturated(self) -> bool:
        return self.saturation > _SATURATED


@dataclass(frozen=True, slots=True)
class PartSize:
    """Bytes of a part of the model, before and after."""

    part: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything on a page.

    Args:
        directory: name of the checkpoint's.
        config: config.json.
        conversion: `amaxbridge.json`, {} where there is none.
        modules: the quantized ones, in the order of the model.
        parts: sizes.
        left: bytes and number of the linear modules that are not quantized, by name without numbers.
        state: what training calibrated, where it is kept.
        measured: whether there was a reference.
    """

    directory: str
    config: Json
    conversion: Json
    modules: list[ModuleFacts]
    parts: list[PartSize]
    left: dict[str, int]
    state: QuantState | None
    measured: bool

    @property
    def before(self) -> int:
        return sum(part.before for part in self.parts)

    @property
    def after(self) -> int:
        return sum(part.after for part in self.parts)

    @property
    def saturated(self) -> list[ModuleFacts]:
        """Modules with weights beyond their amax, the worst first."""
        found = [module for module in self.modules if module.is_saturated]
        return sorted(found, key=lambda module: -module.saturation)


def gather(directory: Path, reference: Path | None = None, quant_state: Path | None = None) -> Facts:
    """Reads a checkpoint for a report.

    Args:
        directory: of safetensors, with config.json.
        reference: what it was made from, with plain weights.
        quant_state: file of the state of training; by default the one beside the weights.

    Raises:
        UsageError: no such directory, or a state of another model.
        CheckpointError: files that are not whole.
    """
    config = _json(directory / CONFIG_FILE)
    if config is None:
        raise UsageError(f"{directory} is not a Hugging Face model directory: no {CONFIG_FILE} there")
    if reference is not None and not reference.is_dir():
        raise UsageError(f"reference={reference} is not a directory")
    kept = quant_state or directory / QUANT_STATE_FILE
    state = read_quant_state(kept, config) if quant_state or kept.is_file() else None
    with SafetensorsCheckpoint(directory) as checkpoint:
        quantized = _quantized(checkpoint.tensors)
        schemes = schemes_of(config.get("quantization_config") or {}, quantized)
        original = SafetensorsCheckpoint(reference, _packed(config)) if reference else None
        try:
            modules = [
                _module(name, checkpoint.tensors, schemes.get(name), state, original)
                for name in sorted(quantized, key=natural_key)
            ]
        finally:
            if original:
                original.close()
        parts = _parts(checkpoint.tensors, {module.name: module for module in modules})
        left = _left(checkpoint.tensors, quantized)
    conversion = _json(directory / CONVERSION_FILE) or {}
    return Facts(directory.resolve().name, config, conversion, modules, parts, left, state, reference is not None)


def _quantized(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """The modules that are stored as codes."""
    return {
        module_of(name)
        for name, stored in tensors.items()
        if name.endswith(".weight_packed") or (name.endswith(".weight") and stored.spec.dtype in _CODES)
    }


def _module(
    name: str,
    tensors: Mapping[str, StoredTensor],
    scheme: Scheme | None,
    state: QuantState | None,
    original: SafetensorsCheckpoint | None,
) -> ModuleFacts:
    weight_amax, input_amax = _amax_of_scales(name, tensors, scheme)
    if state is not None:
        weight_amax = _number(state.weight_amax(name)) or weight_amax
        input_amax = _number(state.input_amax(name)) or input_amax
    shape = _shape(name, tensors)
    largest = snr = None
    if original is not None and scheme is not None:
        weight = original.read(f"{name}.weight")
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"{name}: {list(weight.shape)} in {original.directory}, {list(shape)} here: give this model's reference"
            )
        parts = {each: stored.read() for each, stored in _of_module(name, tensors).items()}
        largest, snr = _compare(weight, scheme.dequantize(name, parts))
    return ModuleFacts(
        name, place_of(name), scheme.name if scheme else "?", shape, weight_amax, input_amax, largest, snr
    )


def _of_module(name: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    suffixes = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "weight_zero_point")
    return {each: tensors[each] for suffix in suffixes if (each := f"{name}.{suffix}") in tensors}


def _shape(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[int, int]:
    packed = tensors.get(f"{name}.weight_packed")
    rows, columns = (packed or tensors[f"{name}.weight"]).spec.shape
    return rows, columns * (_PACKED[packed.spec.dtype] if packed else 1)


def _amax_of_scales(
    name: str, tensors: Mapping[str, StoredTensor], scheme: Scheme | None
) -> tuple[float | None, float | None]:
    """Per-tensor amax of weight and input, as the scales have them."""

    def read(suffix: str) -> Tensor | None:
        stored = tensors.get(f"{name}.{suffix}")
        return stored.read().float() if stored is not None else None

    weight = _inverse(read("weight_global_scale"))
    if weight is None and isinstance(scheme, Scaled) and (scale := read("weight_scale")) is not None:
        weight = float(scale.max()) * scheme.code.bound
    inputs = _inverse(read("input_global_scale"))
    if inputs is None and (scale := read("input_scale")) is not None:
        inputs = float(scale.max()) * FP8_MAX
    return weight, inputs


def _inverse(divisor: Tensor | None) -> float | None:
    return None if divisor is None or not divisor.min() > 0 else _NVFP4_RANGE / float(divisor.min())


def _number(amax: Tensor | None) -> float | None:
    return None if amax is None else float(amax.max())


def _compare(weight: Tensor, served: Tensor) -> tuple[float, float]:
    """The largest absolute weight, and the ratio of its power to that of the error, in dB."""
    power = error = largest = 0.0
    for first in range(0, len(weight), _ROWS):
        rows = weight[first : first + _ROWS].float()
        power += float(rows.square().sum(dtype=torch.float64))
        error += float((rows - served[first : first + _ROWS].float()).square().sum(dtype=torch.float64))
        largest = max(largest, float(rows.abs().max()))
    return largest, 10 * math.log10(power / error) if error and power else (math.inf if not error else -math.inf)


def _parts(tensors: Mapping[str, StoredTensor], modules: Mapping[str, ModuleFacts]) -> list[PartSize]:
    """Sizes by part of the model; before, quantized weights had 16 bits, and no scales."""
    sizes: dict[str, list[int]] = {}
    for name, stored in tensors.items():
        module = module_of(name)
        size = sizes.setdefault(place_of(module).part, [0, 0])
        size[1] += stored.spec.nbytes
        if module not in modules:
            size[0] += stored.spec.nbytes
        elif name.endswith((".weight_packed", ".weight")):
            size[0] += 2 * math.prod(modules[module].shape)
        elif name.endswith(".bias"):
            size[0] += stored.spec.nbytes
    return sorted((PartSize(part, *size) for part, size in sizes.items()), key=lambda part: -part.before)


def _left(tensors: Mapping[str, StoredTensor], quantized: set[str]) -> dict[str, int]:
    """The other matrices → how many, by name without numbers."""
    found: dict[str, int] = {}
    for name, stored in tensors.items():
        if name.endswith(".weight") and len(stored.spec.shape) == 2 and module_of(name) not in quantized:
            kind = place_of(module_of(name)).pattern
            found[kind] = found.get(kind, 0) + 1
    return found


def _packed(config: Json) -> PackedExperts:
    try:
        return family_of(config).packed_experts or PackedExperts()
    except UnknownArchitectureError:
        return PackedExperts()


def _json(file: Path) -> Json | None:
    if not file.is_file():
        return None
    try:
        content: Json = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from error
    return content


def rows_of(facts: Facts) -> Iterator[Json]:
    """Every module for report.json; numbers that JSON does not have are null."""
    for module in facts.modules:
        row = asdict(module)
        del row["place"]
        yield {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
