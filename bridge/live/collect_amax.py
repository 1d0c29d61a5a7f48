"""Collecting the quantizer state of a live model in Hugging Face names.

Per-tensor state (one number) is fanned out to its Hugging Face names on its own rank, without communication. Then one
collective takes the maximum by name over all ranks: this
covers tensor and data parallel replicas that drifted apart, experts and pipeline stages alike, because a rank without a
value for a name contributes minus infinity.

Per-channel and per-block state follows the weights, in their bundles: `state_parameters` brings it into the shape that
the weight's join takes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amaxbridge.bridge.live.compressed_weights import amax_of_scales, packing_of
from amaxbridge.bridge.live.model_walk import Parameter, Quantizer
from amaxbridge.export.amax.cache_scales import CACHE_QUANTIZERS, PER_HEAD, cache_format_of
from amaxbridge.export.amax.quant_state import Divergence, QuantState
from amaxbridge.export.schemes import quantizer_format
from amaxbridge.export.schemes.quantizer_settings import FOUR_OVER_SIX, LEARNED, LEARNED_UNROUNDED, input_format
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER, MoeAmaxFanoutMapping
from amaxbridge.mappings.errors import AmaxError, UnmappedParameterError, UsageError, listing
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import natural_key
from amaxbridge.mappings.ranks import Axis, Ranks
from amaxbridge.mappings.registry import MappingRegistry

_NO_VALUE = float("-inf")
_GLOBAL = "_global_amax"
_MULTIPLIER = "_pre_quant_scale"
_BUFFERS = ("_amax", "_amax_post", "_amax_pre", _GLOBAL, _MULTIPLIER)
_CONSTANT = 448.0  # amax of a quantizer with use_constant_amax
_HEAD = ":"  # between the name of a cache amax and the number of a head


class _Local(NamedTuple):
    """The quantizer state of one rank, in Hugging Face names."""

    values: dict[str, float]  # per-tensor; minus infinity for a static quantizer that was never calibrated
    formats: dict[str, str]  # by module, or quantizer of the key-value cache
    inputs: dict[str, str]  # by module: formats of input quantizers
    unmapped: list[str]
    of_parts: set[str]  # names whose value is the maximum of per-channel or per-block state: it differs as shards do


def state_parameters(quantizers: Iterable[Quantizer]) -> Iterator[Parameter]:
    """Per-channel and per-block state as tensors that the plan moves with the weights.

    A weight quantizer's state becomes `[rows, blocks]`: ModelOpt keeps per-channel amax as `[out, 1]`, the amax of
    blocks along a row as `[out · blocks, 1]`, and the amax of square blocks as `[rows, 1, columns, 1]`. A disabled
    quantizer only has the vector by which it still multiplies inputs. Stages of chains have none: the gate lets them
    pass where weights are written unquantized. The key-value cache's follows no weight: its one scale is a scalar.
    """
    for quantizer in quantizers:
        if quantizer.chain or quantizer.name.endswith("_bmm_quantizer"):
            continue
        for buffer, tensor in _buffers(quantizer):
            if tensor.numel() > 1:
                name = f"{quantizer.name}.{buffer}"
                yield Parameter(name, _rows_of(tensor, quantizer) if "weight_quantizer" in name else tensor.flatten())


def collect_scalars(
    quantizers: Iterable[Quantizer], registry: MappingRegistry, config: ModelConfig, ranks: Ranks
) -> QuantState:
    """The per-tensor state and the formats of all enabled quantizers. Collective; every rank gets the same.

    The maximum of a per-block amax is per-tensor state too: `_global_amax`, unless ModelOpt keeps one itself. So are
    the amax of a key-value cache's heads, which are few: tensor-parallel ranks have some heads each.

    Raises:
        UnmappedParameterError: an enabled quantizer has no Hugging Face name.
        UsageError: ranks have quantizers of different formats for one module.
        AmaxError: the amax of a key-value cache are not those of all heads.
    """
    local = _local_state(_collected(quantizers), registry, ranks.rank(Axis.TP))
    names_only = local._replace(values=dict.fromkeys(local.values, 0.0))
    reports: list[_Local] = ranks.all_gather_object(Axis.WORLD, names_only)
    unmapped = sorted({name for report in reports for name in report.unmapped}, key=natural_key)
    if unmapped:
        raise UnmappedParameterError(
            f"{len(unmapped)} enabled quantizers have no mapping:{listing(unmapped)}\n{_why_unmapped(unmapped)}"
            "Disable them before the export, or add mappings of the weights beside them to "
            f"{registry.file or 'a family file of your own (family=FILE.py, docs/custom-models.md)'}"
        )
    names = sorted({name for report in reports for name in report.values}, key=natural_key)
    least, greatest = _reduce(names, local.values, ranks)
    known = [name for name in names if greatest[name] != _NO_VALUE]
    whole = set(known).difference(*(report.of_parts for report in reports))
    return QuantState(
        amax=_with_heads({name: greatest[name] for name in known}, config),
        formats=_agreed("weights", [report.formats for report in reports]),
        inputs=_agreed("inputs", [report.inputs for report in reports]),
        missing=frozenset(names) - frozenset(known),
        divergent={
            name: Divergence(least[name], greatest[name])
            for name in known
            if name in whole and least[name] != greatest[name]
        },
    )


class ScalarsAgain:
    """The values of `collect_scalars` once more, by the names that it found: one vector, in one collective.

    The quantizers must be the same, with the same settings and shapes; a `Watch` notices others.

    Args:
        state: what `collect_scalars` returned for these quantizers.
    """

    def __init__(
        self, quantizers: Iterable[Quantizer], state: QuantState, registry: MappingRegistry, ranks: Ranks
    ) -> None:
        self._ranks, self._tp_rank = ranks, ranks.rank(Axis.TP)
        names = (name for name, amax in state.amax.items() for name in _with_numbers(name, amax))
        self.names = [*names, *sorted(state.missing, key=natural_key)]
        self.position = {name: at for at, name in enumerate(self.names)}
        self._buffers = list[tuple[Any, str, str]]()  # module, where it keeps the buffer, name
        self._others = list[tuple[Quantizer, Sequence[str]]]()
        where: dict[int, int] = {}  # position of a name → that of the buffer
        for quantizer in _collected(quantizers):
            mapping = quantizer_mapping(quantizer, registry)
            assert mapping is not None, f"{quantizer.name} was collected"
            for buffer, kept in _plain_scalars(quantizer):
                names_of_buffer = (target.removesuffix("_amax") + buffer for target in mapping.targets)
                where |= {self.position[name]: len(self._buffers) for name in names_of_buffer}
                self._buffers.append((quantizer.module, kept, buffer))
            if not _is_plain(quantizer):
                self._others.append((quantizer, mapping.targets))
        self._to, self._from = torch.tensor(list(where), dtype=torch.long), torch.tensor(list(where.values()))
        self._vector = torch.empty(len(self.names) + 1)

    def positions(self, name: str, amax: Tensor) -> int | list[int]:
        """Where the value of an amax, or of each head of a key-value cache, is among those collected."""
        found = [self.position[each] for each in _with_numbers(name, amax)]
        return found if amax.ndim else found[0]

    def values_of(self, state: QuantState) -> Tensor:
        """What `collect` would return for a state: fp32 `[names]`."""
        values = torch.full((len(self.names),), _NO_VALUE)
        for name, amax in state.amax.items():
            values[self.positions(name, amax)] = amax
        return values

    def collect(self, flag: bool) -> tuple[Tensor, bool]:
        """The maximum of each name over all ranks, fp32 `[names]` on the CPU; and if the flag of any rank is True.

        Collective. A rank whose flag is True reads nothing.
        """
        self._vector.fill_(_NO_VALUE)
        self._vector[-1] = float(flag)
        if not flag and self.names:
            self._read()
        greatest = self._ranks.all_reduce_max(Axis.WORLD, self._vector)
        return greatest[:-1], bool(greatest[-1] > 0)

    def _read(self) -> None:
        tensors = [vars(module)[kept][name].detach().reshape(1) for module, kept, name in self._buffers]
        if len({tensor.device for tensor in tensors}) > 1:
            tensors = [tensor.cpu() for tensor in tensors]
        if tensors:
            values = torch.cat(tensors).float().cpu()[self._from]  # a GPU is waited for once
            self._vector[self._to] = torch.where(values.isnan(), float("inf"), values)
        for quantizer, targets in self._others:
            for name, value in _values_of(quantizer, targets, self._tp_rank):
                self._vector[self.position[name]] = value


def _collected(quantizers: Iterable[Quantizer]) -> Iterator[Quantizer]:
    """Those whose per-tensor state is collected."""
    return (each for each in quantizers if each.module.is_enabled and not each.chain)


def _is_plain(quantizer: Quantizer) -> bool:
    """True if every value of its per-tensor state is that of a buffer or parameter of its own."""
    constant = bool(getattr(quantizer.module, "_use_constant_amax", False))
    if constant or is_per_head(quantizer) or packing_of(quantizer) is not None:
        return False
    held = vars(quantizer.module)
    own = held["_buffers"].keys() | held["_parameters"].keys()
    return all(tensor.numel() == 1 and name in own for name, tensor in _buffers(quantizer))


def _plain_scalars(quantizer: Quantizer) -> Iterator[tuple[str, str]]:
    """The buffers that hold the per-tensor state of a plain quantizer, and where its module keeps each."""
    if _is_plain(quantizer):
        held = vars(quantizer.module)
        for buffer, _ in _buffers(quantizer):
            yield buffer, next(kept for kept in ("_buffers", "_parameters") if buffer in held[kept])


def _with_numbers(name: str, amax: Tensor) -> Iterable[str]:
    """The names under which an amax is collected: one for each head of a key-value cache."""
    return (f"{name}{_HEAD}{head}" for head in range(len(amax))) if amax.ndim else (name,)


def _agreed(what: str, reports: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The formats of all ranks."""
    found: dict[str, dict[str, None]] = {}
    for report in reports:
        for module, form in report.items():
            found.setdefault(module, {})[form] = None
    differ = [f"{module}: {'; '.join(forms)}" for module, forms in found.items() if len(forms) > 1]
    if differ:
        raise UsageError(
            f"ranks have quantizers of different formats for the {what} of {len(differ)} modules:{listing(differ)}\n"
            "Quantize the model with one configuration on every rank"
        )
    return {module: form for module, forms in found.items() for form in forms}


def _why_unmapped(names: Sequence[str]) -> str:
    """Why quantizers of attention have no place; "" for others."""
    if any(name.endswith(CACHE_QUANTIZERS) for name in names):
        return (
            "Latent attention: training rounds the keys and values of each head, but engines keep the latent vector "
            "that they are made of, whose amax no quantizer has.\n"
        )
    return ""


def _with_heads(values: Mapping[str, float], config: ModelConfig) -> dict[str, Tensor]:
    """The amax by name: that of a cache with one for each head as a vector.

    Raises:
        AmaxError: it is not one for each key and value head of the model.
    """
    amax, heads = dict[str, Tensor](), dict[str, dict[int, float]]()
    for name, value in values.items():
        quantizer, several, head = name.partition(_HEAD)
        if several:
            heads.setdefault(quantizer, {})[int(head)] = value
        else:
            amax[name] = torch.tensor(value)
    wanted = config.num_query_groups or config.num_attention_heads
    lost = [f"{name}: of {len(found)} heads" for name, found in heads.items() if len(found) != wanted]
    if lost:
        raise AmaxError(
            f"{len(lost)} amax of the key-value cache do not have the {wanted} heads of the model:{listing(lost)}\n"
            "ModelOpt saves those of the first tensor-parallel rank alone: export from the live model "
            "(save_hf_pretrained), or calibrate with one scale for all heads (axis=None)"
        )
    return amax | {name: torch.tensor([found[head] for head in sorted(found)]) for name, found in heads.items()}


def _local_state(quantizers: Iterable[Quantizer], registry: MappingRegistry, tp_rank: int) -> _Local:
    local = _Local({}, {}, {}, [], set())
    for quantizer in quantizers:
        mapping = quantizer_mapping(quantizer, registry)
        if mapping is None:
            local.unmapped.append(quantizer.name)
            continue
        for target in mapping.targets:
            if target.endswith(WEIGHT_QUANTIZER):
                local.formats[target.removesuffix(WEIGHT_QUANTIZER)] = format_name(quantizer.module)
            elif target.endswith(INPUT_QUANTIZER):
                local.inputs[target.removesuffix(INPUT_QUANTIZER)] = input_format_name(quantizer.module)
            elif target.removesuffix("._amax").endswith(CACHE_QUANTIZERS):
                local.formats[target.removesuffix("._amax")] = cache_format_name(quantizer.module)
        local.values.update(_values_of(quantizer, mapping.targets, tp_rank))
        if not is_per_head(quantizer) and _GLOBAL not in dict(_buffers(quantizer)):
            local.of_parts.update(
                name for target in mapping.targets if (name := target.removesuffix("_amax") + _GLOBAL) in local.values
            )
    return local


def _values_of(quantizer: Quantizer, targets: Sequence[str], tp_rank: int) -> Iterator[tuple[str, float]]:
    """The per-tensor state of one quantizer under its Hugging Face names."""
    if is_per_head(quantizer):
        yield from _heads(quantizer, targets, tp_rank)
        return
    for buffer, value in _scalars(quantizer):
        yield from ((target.removesuffix("_amax") + buffer, value) for target in targets)


def quantizer_mapping(quantizer: Quantizer, registry: MappingRegistry) -> MegatronParamMapping | None:
    """The mapping of a quantizer's amax; one shared by several experts is mapped to their names only."""
    mapping = registry.megatron_to_hf_lookup(f"{quantizer.name}._amax")
    return mapping.for_experts(quantizer.experts) if isinstance(mapping, MoeAmaxFanoutMapping) else mapping


def _buffers(quantizer: Quantizer) -> Iterator[tuple[str, Tensor]]:
    """The buffers that act on values."""
    scale = getattr(quantizer.module, "_scale", None)
    if quantizer.module.is_enabled and scale is not None and (packing := packing_of(quantizer)) is not None:
        yield "_amax", amax_of_scales(packing, scale, getattr(quantizer.module, "_double_scale", None))
        return
    constant = bool(getattr(quantizer.module, "_use_constant_amax", False))
    if constant and quantizer.module.is_enabled:
        yield "_amax", torch.tensor(_CONSTANT)
    for buffer in _BUFFERS:
        tensor = getattr(quantizer.module, buffer, None)
        calibrated = quantizer.module.is_enabled and not constant and not _is_mx(quantizer.module)
        acts = quantizer.multiplies_input if buffer == _MULTIPLIER else calibrated
        if isinstance(tensor, Tensor) and acts:
            yield buffer, tensor.detach()


def _scalars(quantizer: Quantizer) -> Iterator[tuple[str, float]]:
    """Per-tensor state by buffer. NaN becomes infinity, which survives any backend's maximum and is refused too."""
    found = dict(_buffers(quantizer))
    if found.keys().isdisjoint(("_amax", "_amax_post")) and not is_dynamic(quantizer.module):
        yield "_amax", _NO_VALUE
    for buffer, tensor in found.items():
        if tensor.numel() == 1:
            yield buffer, _not_nan(float(tensor))
        elif buffer == "_amax" and _GLOBAL not in found:
            yield _GLOBAL, _not_nan(float(tensor.max()))


def is_per_head(quantizer: Quantizer) -> bool:
    """True for a quantizer of the key-value cache with an amax for each head."""
    return quantizer.name.endswith(CACHE_QUANTIZERS) and cache_format_name(quantizer.module) == PER_HEAD.name


def _heads(quantizer: Quantizer, targets: Iterable[str], tp_rank: int) -> Iterator[tuple[str, float]]:
    """The amax of this rank's heads by name and number; like a missing one where it was never calibrated."""
    amax = dict(_buffers(quantizer)).get("_amax")
    if amax is None:
        yield from ((name, _NO_VALUE) for name in targets)
        return
    for number, value in enumerate(amax.flatten().tolist(), tp_rank * amax.numel()):
        yield from ((f"{name}{_HEAD}{number}", _not_nan(value)) for name in targets)


def _not_nan(value: float) -> float:
    return float("inf") if math.isnan(value) else value


def _rows_of(tensor: Tensor, quantizer: Quantizer) -> Tensor:
    return as_rows(tensor, quantizer.rows, getattr(quantizer.module, "block_sizes", None))


def as_rows(tensor: Tensor, rows: int | None, block_sizes: Mapping[Any, Any] | None) -> Tensor:
    """The amax `[rows, blocks]`; `[rows, blocks, 1]` where a rank's one block would look like a whole row or column.

    Args:
        rows: those of the rank's weight, None if unknown.
        block_sizes: the quantizer's, None if it has none.
    """
    if tensor.ndim == 4:
        tensor = tensor.flatten(2).flatten(0, 1)
    elif rows:
        tensor = tensor.reshape(rows, -1)
    of_blocks = isinstance((block_sizes or {}).get(-1), int)
    return tensor[..., None] if of_blocks and 1 in tensor.shape else tensor


def amax_shape(block_sizes: Mapping[Any, Any], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which ModelOpt keeps an amax `[rows, blocks]`: the inverse of `state_parameters`."""
    rows, columns = shape
    if block_sizes.get(-2):
        return rows, 1, columns, 1
    return (rows * columns, 1) if block_sizes.get(-1) else (rows, columns)


def _reduce(names: list[str], local: Mapping[str, float], ranks: Ranks) -> tuple[dict[str, float], dict[str, float]]:
    """Least and greatest value of each name over all ranks with a value, in one collective."""
    values = torch.tensor([local.get(name, _NO_VALUE) for name in names], dtype=torch.float32)
    negated = torch.where(values == _NO_VALUE, values, -values)
    greatest, least = ranks.all_reduce_max(Axis.WORLD, torch.stack([values, negated]))
    return dict(zip(names, (-least).tolist(), strict=True)), dict(zip(names, greatest.tolist(), strict=True))


def is_dynamic(quantizer: Any) -> bool:
    """True if a quantizer computes its amax from each tensor or block (MX): there is none to collect."""
    return bool(getattr(quantizer, "_dynamic", False)) or _is_mx(quantizer)


def _is_mx(quantizer: Any) -> bool:
    """True if scales are powers of two, made from each block. ModelOpt ignores an amax that calibration left there."""
    blocks = getattr(quantizer, "block_sizes", None) or {}
    return blocks.get("type") == "dynamic" and blocks.get("scale_bits") == (8, 0)


def format_name(quantizer: Any) -> str:
    """The format of a ModelOpt TensorQuantizer for weights, as schemes name it (`nvfp4`), or a description."""
    bits, axis, blocks = quantizer.num_bits, quantizer.axis, quantizer.block_sizes or None
    found = quantizer_format(bits, axis, blocks)
    if found is not None and getattr(quantizer, "_lsq", False):
        return f"{found}{LEARNED if getattr(quantizer, '_quantize_pre_scale', True) else LEARNED_UNROUNDED}"
    if found is not None and (blocks or {}).get("four_over_six"):
        return f"{found}{FOUR_OVER_SIX}"
    return found or f"num_bits={bits} axis={axis} block_sizes={blocks}"


def cache_format_name(quantizer: Any) -> str:
    """The format of a quantizer of the key-value cache: the name of a `CacheFormat`, or else in words."""
    return cache_format_of(input_format_name(quantizer))


def input_format_name(quantizer: Any) -> str:
    """The format of a ModelOpt TensorQuantizer for inputs, in words that schemes use too."""
    dynamic = bool(getattr(quantizer, "_dynamic", False))
    return input_format(quantizer.num_bits, quantizer.axis, quantizer.block_sizes, dynamic=dynamic)
