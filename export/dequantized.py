"""A quantized Hugging Face directory as training needs it: weights in 16 bits, and the amax that its scales imply.

Each weight is read and dequantized when it is asked for, so one is in memory at a time. For 4-bit formats dequantizing
is not
enough: the weight must be one that ModelOpt quantizes to the same bytes again (`kernels.restore`). That is checked, not
assumed: each weight is quantized once more, and differences are recorded in `changed`.

Formats for which ModelOpt has no quantizer (zero points) are dequantized, too, but have no entry in `formats`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.cache_scales import PER_TENSOR, cache_format, stored_cache_scales
from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.model_free.converted_checkpoint import ConvertedCheckpoint
from amaxbridge.export.model_free.converters.quantized_source import check_cache, recognize
from amaxbridge.export.quant_config import QuantConfig, read_quant_config
from amaxbridge.export.quantization_declared import MODELOPT, declared_quantization
from amaxbridge.export.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme
from amaxbridge.export.schemes.stored_specs import stored_specs
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec, max_of

_READ_AS_THEY_ARE = ("mxfp4",)  # packed experts of GPT-OSS, which `SafetensorsCheckpoint` cuts
_GPT_OSS = "gpt_oss"
_READ_BY_CONVERTERS = ("quant_algo", "pre_quant_scale")  # faults of ModelOpt's configs that its converter does not mind
_CHANGE_MEANING = frozenset(("pre_quant_scale", "weight_scale_2", "weight_zero_point", "weight_g_idx"))
_ANY = TensorSpec((1024, 1024), torch.bfloat16)  # which tensors a scheme writes does not depend on the shape


@dataclass(frozen=True, slots=True)
class Changed:
    """What changes in a weight that is quantized again.

    Args:
        scales: number of block scales that change.
        codes: number of bytes of codes that change.
        values: True if dequantized values change, not only the scales of blocks of zeros.
        divisor: True if the global scale changes, by one bit: no amax yields it.
    """

    scales: int
    codes: int
    values: bool
    divisor: bool

    def __str__(self) -> str:
        parts = [f"{self.scales:,} block scales"] * (self.scales > 0) + [f"{self.codes:,} bytes"] * (self.codes > 0)
        parts += ["the last bit of the global scale"] * self.divisor
        return ", ".join(parts) + ("" if self.values else "; the values are the same")


class DequantizedCheckpoint:
    """The tensors of a directory by name, weights dequantized.

    Args:
        checkpoint: the directory, open for reading.
        quantization: `quantization_config` of its config.json, or what ModelOpt says beside it; None if it is not
            quantized, or a `ConvertedCheckpoint`, which says it itself.

    Attributes:
        schemes: quantized module → its scheme.
        dequantized: modules that no scheme holds, which are quantized in the directory and have no amax here.
        cache_format: the format of `cache_scales`; FP8 per tensor where config.json does not say.
        cache_scales: the buffers of the key-value cache's quantizers → their scales.

    Raises:
        UsageError: another quantization than of compressed-tensors, or a format that is not known here.
        CheckpointError: a quantized module lacks tensors, or config.json gives it no scheme; all are named.
    """

    def __init__(
        self, checkpoint: SafetensorsCheckpoint | ConvertedCheckpoint, quantization: Mapping[str, Any] | None
    ) -> None:
        self.checkpoint = checkpoint
        self.changed: dict[str, Changed] = {}
        self.schemes: Mapping[str, Scheme] = {}
        self.dequantized: Sequence[str] = ()
        config = read_quant_config(quantization)
        self.cache_format = cache_format(config.kv_cache) or PER_TENSOR
        self.cache_scales = stored_cache_scales(checkpoint.weight_map, config.kv_cache)
        if isinstance(checkpoint, ConvertedCheckpoint):
            self.schemes, self.dequantized = checkpoint.schemes, checkpoint.dequantized
            return
        if config.method in _READ_AS_THEY_ARE:
            return
        if config.method not in ("", COMPRESSED_TENSORS, MODELOPT):
            raise UsageError(
                f"{checkpoint.directory} is quantized as quant_method={config.method!r}; only {COMPRESSED_TENSORS} and "
                f"{MODELOPT} are read"
            )
        self.schemes = _find_schemes(checkpoint, config.checked())

    @cached_property
    def state(self) -> QuantState:
        """Amax and formats for the quantizers of a model; each amax is read when it is asked for."""
        formats = {module: scheme.format for module, scheme in self.schemes.items() if scheme.format}
        return QuantState(amax=_LazyAmax(self), formats=formats)

    def read(self, name: str) -> Tensor:
        """Reads one tensor; the weight of a quantized module in bf16.

        Raises:
            CheckpointError: there is no such tensor.
        """
        module = module_of(name)
        if module not in self.schemes or not name.endswith(".weight"):
            return self.checkpoint.read(name)
        scheme = self.schemes[module]
        stored = {each: self.checkpoint.read(f"{module}.{each}") for each in _local_names(scheme)}
        _check_usable(module, scheme, stored)
        weight = scheme.restore(stored)
        if not weight.isfinite().all():
            raise CheckpointError(f"{module}: codes or scales hold NaN or infinity: `amaxbridge verify` says which")
        if scheme.format:
            self._compare(module, scheme, stored, weight)
        return weight

    def specs(self) -> dict[str, TensorSpec] | None:
        """What `read` gives under each name, from headers alone; None for files that a converter reads."""
        if isinstance(self.checkpoint, ConvertedCheckpoint):
            return None
        found = {name: stored.spec for name, stored in self.checkpoint.tensors.items()}
        for scale in self.cache_scales.values():
            found.pop(scale)
        for module, scheme in self.schemes.items():
            stored = {each: found.pop(f"{module}.{each}") for each in _local_names(scheme)}
            if (shape := scheme.weight_shape(stored)) is not None:  # `_misfits` has refused the others
                found[f"{module}.weight"] = TensorSpec(shape, torch.bfloat16)
        return found

    def amax(self, quantizer: str) -> Tensor | None:
        """The amax of a quantizer by buffer name, `….weight_quantizer._amax`; None if the format has none.

        fp32, `[blocks down, blocks across]` for the blocks of a weight, else 0-d.
        """
        if quantizer in self.cache_scales:
            return self.cache_format.amax(self.checkpoint.read(self.cache_scales[quantizer]))
        module = quantizer.rpartition("_quantizer.")[0].rpartition(".")[0]
        scheme = self.schemes.get(module)
        if scheme is None or not scheme.format:
            return None
        stored = _Local(self.checkpoint, module)
        found = None
        if quantizer == module + INPUT_QUANTIZER:
            found = scheme.input_amax(stored)
        elif quantizer == module + WEIGHT_QUANTIZER:
            found = scheme.weight_amax(stored)
        if found is not None and not (found.isfinite() & (found >= 0)).all():
            raise CheckpointError(f"{quantizer}: a scale of {module} is NaN, infinite, negative or zero")
        return found

    def _compare(self, module: str, scheme: Scheme, stored: Mapping[str, Tensor], weight: Tensor) -> None:
        """Quantizes a weight again with the amax of its future quantizer, the largest of its fused group."""
        own, shared = self.amax(module + WEIGHT_QUANTIZER), None
        if scheme.needs_weight_amax:
            members = [member for member in group_of(module).members if self.schemes.get(member) is scheme]
            found = (self.amax(member + WEIGHT_QUANTIZER) for member in members)
            shared = max_of([amax for amax in found if amax is not None])
        group = GroupAmax(shared, torch.ones(()))
        blocks = None if own is None or scheme.needs_weight_amax else BlockAmax(own)
        again = scheme.quantize_rows(weight, group, blocks)
        again |= scheme.constants(TensorSpec.of(weight), group)
        differ = {name: _differences(tensor, stored[name]) for name, tensor in again.items()}
        not_compared = {"weight_shape", scheme.input_scale and scheme.input_scale.tensor}
        if any(count for name, count in differ.items() if name not in not_compared):
            scale = scheme.group_scale
            self.changed[module] = Changed(
                scales=differ.get("weight_scale", 0),
                codes=differ[scheme.codes],
                values=not torch.equal(scheme.dequantize(again), scheme.dequantize(stored)),
                divisor=scale is not None and scale.is_divisor and bool(differ[scale.tensor]),
            )


def _find_schemes(checkpoint: SafetensorsCheckpoint, config: QuantConfig) -> dict[str, Scheme]:
    unknown = [f"config_groups.{each.name}: {each.signature}" for each in config.groups if each.scheme is None]
    if unknown:
        raise UsageError(
            f"{checkpoint.directory} has groups of no scheme that is known here:{listing(unknown)}\n"
            f"Known: {', '.join(SCHEMES)}"
        )
    tensors = checkpoint.weight_map
    quantized = {module_of(name) for name in tensors if name.endswith((".weight_packed", ".weight_scale"))}
    found = {module: config.scheme_of(module) for module in sorted(quantized)}
    problems = [f"{module}: quantized, and no group of config.json targets it" for module in found if not found[module]]
    schemes = {module: scheme for module, scheme in found.items() if scheme is not None}
    problems += [
        f"{name}: missing, which {scheme.name} has"
        for module, scheme in schemes.items()
        for name in (f"{module}.{each}" for each in _local_names(scheme))
        if name not in tensors
    ]
    problems += [
        f"{name}: no tensor of {schemes[module].name}, so what it changes would be lost"
        for name in tensors
        if (module := module_of(name)) in schemes
        and name.removeprefix(f"{module}.") in _CHANGE_MEANING - {*_local_names(schemes[module])}
    ]
    if not problems:
        problems += [problem for module, scheme in schemes.items() for problem in _misfits(checkpoint, module, scheme)]
    if problems:
        raise CheckpointError(f"{checkpoint.directory} is not what its config.json says:{listing(problems)}")
    return schemes


def _misfits(checkpoint: SafetensorsCheckpoint, module: str, scheme: Scheme) -> Iterator[str]:
    """The tensors of a module with other dtypes or shapes than its scheme writes."""
    specs = {name: checkpoint.tensors[f"{module}.{name}"].spec for name in _local_names(scheme)}
    shape = scheme.weight_shape(specs)
    if shape is None:
        yield f"{module}: its codes are no matrix"
        return
    try:
        allowed = stored_specs(scheme, (shape[0], shape[1]))
    except ValueError as error:
        yield f"{module}: {error}"
        return
    for name, spec in specs.items():
        if spec not in allowed[name]:
            yield f"{module}.{name}: {spec}, must be {' or '.join(sorted(map(str, allowed[name])))}"


def _check_usable(module: str, scheme: Scheme, stored: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a scale is NaN, infinite or negative, or a shared one zero."""
    for name, tensor in stored.items():
        if name == scheme.codes or not tensor.dtype.is_floating_point:
            continue
        values, shared = tensor.float(), scheme.group_scale is not None and name == scheme.group_scale.tensor
        if not (values.isfinite() & ~values.signbit() & ((values > 0) if shared else True)).all():
            raise CheckpointError(f"{module}.{name} is NaN, infinite, negative or zero somewhere: it is no scale")


def open_dequantized(checkpoint: SafetensorsCheckpoint, config: Mapping[str, Any]) -> DequantizedCheckpoint:
    """Opens a directory whose tensors are plain, or quantized in any format that `quantize` reads.

    Args:
        checkpoint: the directory, open for reading.
        config: its config.json.

    Raises:
        UsageError: its tensors are quantized in another way, whatever it says of them.
        CheckpointError: as `DequantizedCheckpoint`.
    """
    declared = declared_quantization(config, checkpoint.directory)
    for each in declared:
        said = {**each.raw, "quant_method": each.method}
        if each.method == COMPRESSED_TENSORS or (each.method == MODELOPT and _is_in_our_schemes(checkpoint, said)):
            return DequantizedCheckpoint(checkpoint, said)
    places = checkpoint.weight_map.items()
    stored = {name: found for name, file in places if (found := checkpoint.tensors_in(file).get(name)) is not None}
    source = recognize(stored, declared)
    if source is None or source.formats == (_GPT_OSS,):
        return DequantizedCheckpoint(checkpoint, None)
    check_cache(stored, declared)
    return DequantizedCheckpoint(ConvertedCheckpoint(checkpoint, source, config), None)


def _is_in_our_schemes(checkpoint: SafetensorsCheckpoint, said: Mapping[str, Any]) -> bool:
    """True if a config of ModelOpt has algorithms of our schemes alone, inputs too, and nothing multiplies inputs.

    Raises:
        UnsupportedQuantizationError: something else in it is not understood.
    """
    config = read_quant_config(said)
    others = [fault for fault in config.faults if fault.where in _READ_BY_CONVERTERS]
    replace(config, faults=tuple(fault for fault in config.faults if fault not in others)).checked()
    says_all = not others and all(group.scheme is None or group.scheme.says_inputs for group in config.groups)
    return says_all and not any(name.endswith(".pre_quant_scale") for name in checkpoint.weight_map)


class _Local(Mapping[str, Tensor]):
    """The tensors of one module by local name, each read when asked for."""

    def __init__(self, checkpoint: SafetensorsCheckpoint | ConvertedCheckpoint, module: str) -> None:
        self._checkpoint, self._module = checkpoint, module

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.read(f"{self._module}.{name}")

    def __iter__(self) -> Iterator[str]:
        prefix = f"{self._module}."
        return (name.removeprefix(prefix) for name in self._checkpoint.weight_map if name.startswith(prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _LazyAmax(Mapping[str, Tensor]):
    """All amax of a checkpoint by buffer name, each read when asked for: a rank needs only its own modules'."""

    def __init__(self, source: DequantizedCheckpoint) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        amax = self._source.amax(name)
        if amax is None:
            raise KeyError(name)
        return amax

    def __iter__(self) -> Iterator[str]:
        yield from self._source.cache_scales
        for module, scheme in self._source.schemes.items():
            if scheme.has_weight_amax:
                yield module + WEIGHT_QUANTIZER
            if scheme.format and scheme.needs_input_amax:
                yield module + INPUT_QUANTIZER

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _local_names(scheme: Scheme) -> list[str]:
    """The tensors of a quantized module."""
    return list(scheme.tensor_specs(_ANY, Arithmetic.MODELOPT))


def _differences(one: Tensor, other: Tensor) -> int:
    """The number of different elements; -0.0 and 0.0 differ, scales in another dtype may be equal."""
    if one.dtype == other.dtype:
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
        one, other = one.contiguous().view(view), other.contiguous().view(view)
    else:
        one, other = one.float(), other.float()
    return 0 if torch.equal(one, other) else int((one != other).sum())
