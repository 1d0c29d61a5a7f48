"""What a source is, on headers: which of its modules are quantized, and how each holds its weight.

A source says so in config.json or beside it (`declared_quantization`), and its tensors show it: codes in 8 bits, and
names that only quantized modules have. What is declared chooses the format; the tensors decide. A source whose tensors
are all plain is plain, whatever it declares; one that declares nothing is read where its tensors alone say everything;
all else is refused by name.
"""

import logging
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from amaxbridge.export.disk.safetensors_file import StoredTensor
from amaxbridge.export.model_free.converters.source_formats import (
    SOURCE_FORMATS,
    ReadModule,
    SourceFormat,
    format_declared,
    format_named,
)
from amaxbridge.export.model_free.converters.stored_weight import Local, StoredWeight
from amaxbridge.export.quantization_declared import Declared
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.names import is_quantizer_state
from amaxbridge.mappings.tensors import TensorSpec

_COMPANIONS = frozenset(
    (
        "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "weight_shape", "weight_global_scale",
        "weight_zero_point", "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point",
        "activation_scale", "output_scale", "pre_quant_scale", "qweight", "qzeros", "scales", "g_idx", "blocks",
        "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB",
    )
)  # fmt: skip
"""Local names of tensors that only quantized modules have."""
_CODES = frozenset((torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int16))
_BESIDE = frozenset(("bias", "k_scale", "v_scale"))
"""Local names that a quantized module may have beside its weight."""
_INTEGERS = (torch.int32, torch.int64, torch.bool)
_WEIGHTS = ("weight", "bias", "_proj")
_PACKED = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(?:_(blocks|scales|scale_inv|activation_scale))?")
_LOCAL = {None: "weight", "scale_inv": "weight_scale_inv"}
_log = logging.getLogger("amaxbridge")


@dataclass(frozen=True, slots=True)
class QuantizedSource:
    """The quantized modules of a source.

    Args:
        formats: names of their formats.
        weights: module → how it holds its weight. Packed experts are cut into modules, `experts.3.down_proj`.
        origins: module → the stored tensors that it is made from, codes first.
    """

    formats: tuple[str, ...]
    weights: Mapping[str, StoredWeight]
    origins: Mapping[str, tuple[str, ...]]

    def partners(self) -> dict[str, set[str]]:
        """Name of the stored codes → the other stored tensors of the module."""
        return {names[0]: set(names[1:]) for names in self.origins.values()}


def cut_tensor(name: str, stored: StoredTensor) -> dict[str, StoredTensor]:
    """The parts of quantized packed experts, one for each expert, by a name of its own; else the tensor itself.

    `experts.down_proj_blocks` becomes `experts.0.down_proj.blocks` and so on; likewise `experts.down_proj` if it holds
    codes, and `experts.down_proj_scale_inv`.
    """
    found = _PACKED.fullmatch(name)
    if found is None or not stored.spec.shape or (found[3] is None and stored.spec.dtype not in _CODES):
        return {name: stored}
    local = _LOCAL.get(found[3], found[3])
    return {f"{found[1]}.{at}.{found[2]}.{local}": stored.row(at) for at in range(stored.spec.shape[0])}


def is_from_packed(module: str, origin: str) -> bool:
    """True if a module of a `QuantizedSource` is an expert that was cut out of a packed tensor."""
    return _PACKED.fullmatch(origin) is not None and not origin.startswith(f"{module}.")


def recognize(
    tensors: Mapping[str, StoredTensor], declared: Sequence[Declared] = (), *, wanted: str | None = None
) -> QuantizedSource | None:
    """Finds out which modules of a source are quantized, and how. Reads headers, and small tensors that decide.

    Args:
        tensors: every tensor of the source.
        declared: what the source says; see `declared_quantization`.
        wanted: the name of the format that the user gave; None to choose it.

    Returns:
        The quantized modules; None if there are none.

    Raises:
        UsageError: tensors are quantized in a way that is not known, or not as declared; each is named.
    """
    modules, origins = _by_module(tensors)
    suspects = {module: local for module, local in modules.items() if _is_suspect(local)}
    if not suspects:
        if wanted is not None:
            raise UsageError(f"converter={wanted} finds nothing to convert: no tensor is quantized; leave it out")
        for each in declared:
            _log.warning("%s, and no tensor is quantized: the checkpoint is taken as it is", each)
        return None
    readers = _readers(declared, wanted)
    weights, formats, problems = dict[str, StoredWeight](), dict[str, None](), list[str]()
    for module, local in suspects.items():
        found = _read(module, local, readers)
        if isinstance(found, str):
            problems.append(f"{module}: {found}")
        else:
            weights[module] = found[1]
            formats[found[0]] = None
    if problems:
        raise UsageError(_refusal(problems, declared, list(readers), wanted))
    names = {
        module: tuple(dict.fromkeys(origins[module, local] for local in weight.names))
        for module, weight in weights.items()
    }
    return QuantizedSource(tuple(formats), weights, names)


def _by_module(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, dict[str, StoredTensor]], dict[tuple[str, str], str]]:
    """Tensors by module and local name, packed experts cut; and the stored tensor that each of them lies in."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    origins: dict[tuple[str, str], str] = {}
    for name, stored in tensors.items():
        for single, part in cut_tensor(name, stored).items():
            module, _, local = single.rpartition(".")
            modules.setdefault(module, {})[local] = part
            origins[module, local] = name
    return modules, origins


def _is_suspect(local: Local) -> bool:
    if not _COMPANIONS.isdisjoint(local):
        return True
    return any(stored.spec.dtype in _CODES and not is_mask(name, stored.spec) for name, stored in local.items())


def is_mask(local: str, spec: TensorSpec) -> bool:
    """True for the causal masks that older files hold as `attn.bias`: one byte for each pair of positions."""
    return local in ("bias", "masked_bias") and len(spec.shape) == 4 and spec.shape[:2] == (1, 1)


def _readers(declared: Sequence[Declared], wanted: str | None) -> dict[str, ReadModule]:
    """The readers to ask, by the name of their format."""
    if wanted is not None:
        entry = format_named(wanted)
        fitting = [each for each in declared if each.method in entry.methods]
        others = [each for each in declared if format_declared(each.method) and each not in fitting]
        if others and not fitting:
            right = format_declared(others[0].method)
            assert right is not None
            raise UsageError(f"converter={wanted}, but {others[0]}: leave it out, or give converter={right.name}")
        return {entry.name: _reader(entry, fitting)}
    found: dict[str, tuple[SourceFormat, list[Declared]]] = {}
    for each in declared:
        declared_as = format_declared(each.method)
        if declared_as is None:
            raise UsageError(
                f"{each}, which is not read here: take the checkpoint that it was made from, or give a converter that "
                f"dequantizes it. Read are {', '.join(SOURCE_FORMATS)}"
            )
        found.setdefault(declared_as.name, (declared_as, []))[1].append(each)
    if len(found) > 1:
        said = "; ".join(str(places[0]) for _, places in found.values())
        raise UsageError(f"the source contradicts itself: {said}. Give the right one as converter={'|'.join(found)}")
    if found:
        return {name: _reader(entry, places) for name, (entry, places) in found.items()}
    return {name: entry.reader({}) for name, entry in SOURCE_FORMATS.items() if entry.tells}


def _reader(entry: SourceFormat, places: Sequence[Declared]) -> ReadModule:
    """The reader by the first of the places that declare a format. Every place must be understood."""
    readers = [entry.reader(raw) for raw in [each.raw for each in places] or [{}]]
    return readers[0]


def _read(module: str, local: Local, readers: Mapping[str, ReadModule]) -> tuple[str, StoredWeight] | str:
    """A module's format and weight, or what is wrong with it."""
    there = ", ".join(f"{name} {stored.spec}" for name, stored in local.items())
    for name, read in readers.items():
        try:
            weight = read(module, local)
        except ValueError as error:
            return str(error)
        if weight is None:
            continue
        extra = local.keys() - {*weight.names} - _BESIDE
        return (name, weight) if not extra else f"{name} has no {', '.join(sorted(extra))}; it has {there}"
    return f"it has {there}"


def _refusal(problems: Sequence[str], declared: Sequence[Declared], asked: Iterable[str], wanted: str | None) -> str:
    said = "; ".join(map(str, declared)) or "the source does not say how"
    hint = "Take the checkpoint that it was made from, or give a converter of your own"
    if wanted is None and not declared:
        hint = (
            "Put the quantization_config that belongs to these weights back into config.json, or name a converter "
            f"(converter={'|'.join(SOURCE_FORMATS)})"
        )
    return (
        f"{len(problems)} modules are quantized in a way that {' or '.join(asked)} does not read ({said}):"
        f"{listing(problems)}\n{hint}"
    )


def check_plain(specs: Mapping[str, TensorSpec], kept: Container[str] = ()) -> None:
    """Checks that tensors which are taken as they are can be: weights in 16 or 32 bits, and no codes.

    Args:
        specs: what is written or quantized, after all conversions.
        kept: modules that stay quantized.

    Raises:
        UsageError: codes without a format, or weights in fp64, integers or bool; all are named.
    """
    codes, others = list[str](), list[str]()
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        if module in kept or is_quantizer_state(name) or is_mask(local, spec):
            continue
        if spec.dtype in _CODES or local in _COMPANIONS:
            codes.append(f"{name}: {spec}")
        elif spec.dtype == torch.float64 or (spec.dtype in _INTEGERS and local.endswith(_WEIGHTS)):
            others.append(f"{name}: {spec}")
    if codes:
        raise UsageError(
            f"{len(codes)} tensors belong to quantized weights, and nothing says how to read them:{listing(codes)}\n"
            f"Give a converter that takes all of them: {', '.join(SOURCE_FORMATS)}, or one of your own"
        )
    if others:
        raise UsageError(
            f"{len(others)} weights are in fp64, integers or bool, which no engine serves:{listing(others)}\n"
            "Save the checkpoint again with these tensors in bfloat16, float16 or float32"
        )


def check_cache(tensors: Iterable[str], declared: Sequence[Declared]) -> None:
    """Checks that the scales of a key-value cache are FP8's, if there are any.

    Raises:
        UsageError: the source declares another format for them.
    """
    if not any(name.endswith((".k_scale", ".v_scale")) for name in tensors):
        return
    for each in declared:
        said = each.raw.get("kv_cache_quant_algo") or each.raw.get("kv_cache_scheme")
        if isinstance(said, dict):
            is_fp8 = (said.get("num_bits"), said.get("type")) == (8, "float")
        else:
            is_fp8 = said is None or str(said).upper() == "FP8"
        if not is_fp8:
            raise UsageError(
                f"{each.where} has a key-value cache in {said}, whose scales are not read: take a checkpoint without it"
            )
