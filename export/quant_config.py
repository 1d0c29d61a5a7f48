"""The one reader of `quantization_config` in config.json, whoever wrote it.

The runtime and the import need a config without a fault (`checked`); `verify` reports the faults and continues with the
rest. All of them see the same groups, schemes and matches.

The spelling of each program is an entry of `_SPELLINGS`, which translates it into the words of compressed-tensors. Keys
that only record how a checkpoint was made are skipped; a key that may change what the tensors mean is refused by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from amaxbridge.export.modelopt_config import excluded_modules, in_compressed_tensors_words
from amaxbridge.export.schemes import COMPRESSED_TENSORS, MODELOPT_FORMAT, Scheme, scheme_of
from amaxbridge.export.schemes.signature import ARGUMENT_KEYS, Arguments, Signature, UnsupportedQuantizationError
from amaxbridge.export.schemes.targets import EMBEDDINGS, EVERY_LINEAR, HEAD, is_pattern, means
from amaxbridge.mappings.errors import listing

_KEYS = frozenset(
    (
        "quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme",
        "global_compression_ratio", "version", "sparsity_config", "moe_sparsity_config", "transform_config",
    )
)  # fmt: skip
_NOT_COMPUTED = ("sparsity_config", "moe_sparsity_config", "transform_config")
_GROUP_KEYS = frozenset(("targets", "weights", "input_activations", "output_activations", "format"))
_PARTS = ("weights", "input_activations", "output_activations")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an entry of the config: a subject and what is said of it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.what}"


@dataclass(frozen=True)
class ConfigGroup:
    """One entry of `config_groups`.

    Args:
        name: key of the entry.
        targets: the modules that the group is for.
        format: format on the disk, as the group states it.
        signature: how weights and inputs are quantized; None if malformed.
        raw: the entry itself.
    """

    name: str
    targets: tuple[str, ...]
    format: str | None
    signature: Signature | None
    raw: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def scheme(self) -> Scheme | None:
        """The scheme with this signature; None if there is none here."""
        return None if self.signature is None else scheme_of(self.signature)


@dataclass(frozen=True)
class QuantConfig:
    """What config.json says of quantization; nothing at all for a checkpoint that is not quantized.

    Args:
        raw: the whole entry.
        method: `quant_method`: the program that wrote it.
        format: the format of all groups, or `mixed-precision`.
        groups: the groups, in order.
        ignore: entries for unquantized modules.
        kv_cache: how the key-value cache is quantized; None if it is not.
        unknown_keys: dotted paths of unknown keys.
        faults: everything else that is wrong.
        excluded: `ignore` as ModelOpt spells it, which engines read by other rules.
    """

    raw: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    format: str = ""
    groups: tuple[ConfigGroup, ...] = ()
    ignore: tuple[str, ...] = ()
    kv_cache: Arguments | None = None
    unknown_keys: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    excluded: tuple[str, ...] = ()

    def checked(self) -> "QuantConfig":
        """This config, if every word of it is understood.

        Raises:
            UnsupportedQuantizationError: it is not; names each fault and each unknown key.
        """
        faults = [str(fault) for fault in self.faults]
        faults += [f"{key} is an unknown key, which may change what tensors mean" for key in self.unknown_keys]
        if faults:
            raise UnsupportedQuantizationError(f"quantization_config of config.json cannot be read:{listing(faults)}")
        return self

    def arguments(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every dictionary of quantization arguments as it stands, and where."""
        for group in self.groups:
            for part in _PARTS:
                if isinstance(group.raw.get(part), dict):
                    yield f"{group.name}.{part}", group.raw[part]
        if isinstance(self.raw.get("kv_cache_scheme"), dict):
            yield "kv_cache_scheme", self.raw["kv_cache_scheme"]

    # Which group a module of the checkpoint belongs to

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module; None if it is ignored, targeted by no group, or of no scheme known here."""
        if self.ignored_by(module) is not None:
            return None
        group = self.group_of(module)
        return None if group is None else self.groups[group].scheme

    def group_of(self, module: str) -> int | None:
        """The group that targets a module: by name, else by class. `ignore` is not asked."""
        named = self.named_by(module)
        is_linear = not module.endswith((*EMBEDDINGS, HEAD))
        return self.every_linear if named is None and is_linear else named

    def groups_of(self, module: str, classes: tuple[str, ...] = (EVERY_LINEAR,)) -> list[int]:
        """Every group that targets a module. A sound config has one, or none and ignores the module."""
        return [
            number
            for number, group in enumerate(self.groups)
            if any(means(target, module) or target in classes for target in group.targets)
        ]

    def ignored_by(self, module: str) -> str | None:
        """The entry of `ignore` that means a module: its name, or a pattern for it. There may be thousands of names."""
        if module in self._ignored_names:
            return module
        return next((entry for entry in self._ignored_patterns if means(entry, module)), None)

    def named_by(self, module: str) -> int | None:
        """The first group with a target that is the module's name, or a pattern for it."""
        for number, group in enumerate(self.groups):
            if any(means(target, module) for target in group.targets):
                return number
        return None

    def of_class(self, classes: tuple[str, ...]) -> int | None:
        """The first group that targets one of these classes."""
        found = (number for number, group in enumerate(self.groups) if not set(classes).isdisjoint(group.targets))
        return next(found, None)

    @cached_property
    def every_linear(self) -> int | None:
        """The first group that targets `Linear`."""
        return self.of_class((EVERY_LINEAR,))

    @cached_property
    def _ignored_names(self) -> frozenset[str]:
        return frozenset(self.ignore)

    @cached_property
    def _ignored_patterns(self) -> tuple[str, ...]:
        return tuple(filter(is_pattern, self.ignore))


def read_quant_config(raw: Any) -> QuantConfig:
    """Reads the `quantization_config` of a config.json; None or {} is of a checkpoint that is not quantized.

    Nothing is raised: see `QuantConfig.checked`.
    """
    if not raw:
        return QuantConfig()
    if not isinstance(raw, dict):
        return QuantConfig(faults=(Fault("quantization_config", "is not an object"),))
    method = str(raw.get("quant_method", COMPRESSED_TENSORS))
    spelling = _SPELLINGS.get(method)
    if spelling is None:
        known = ", ".join(_SPELLINGS)
        return QuantConfig(raw, method, faults=(Fault("quant_method", f"is {method}, not {known}"),))
    spelled, wrong = spelling(raw)
    found = _of_compressed_tensors(raw, method, spelled, [Fault(where, what) for where, what in wrong])
    return replace(found, excluded=excluded_modules(raw) or ()) if method == MODELOPT_FORMAT else found


def _of_compressed_tensors(
    raw: Mapping[str, Any], method: str, spelled: Mapping[str, Any], faults: list[Fault]
) -> QuantConfig:
    """From a config in the words of compressed-tensors."""
    unknown = [key for key in spelled if key not in _KEYS and spelled[key] is not None]
    faults += [
        Fault("quantization_config", f"has {key}, which is not computed here")
        for key in _NOT_COMPUTED
        if _says_something(spelled.get(key))
    ]
    quant_format, groups = str(spelled.get("format") or ""), list[ConfigGroup]()
    entries = spelled.get("config_groups") or {}
    if not isinstance(entries, dict):
        faults.append(Fault("config_groups", "is not an object"))
        entries = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            faults.append(Fault(f"config_groups.{name}", "is not an object"))
            continue
        stated = {key: value for key, value in entry.items() if value is not None}
        unknown += _unknown_in(stated, name, _GROUP_KEYS)
        known = dict(entry)
        for part in _PARTS:
            if isinstance(entry.get(part), dict):
                unknown += _unknown_in(entry[part], f"{name}.{part}", ARGUMENT_KEYS)
                known[part] = {key: value for key, value in entry[part].items() if key in ARGUMENT_KEYS}
        signature = None
        try:
            signature = Signature.of(known, quant_format)
        except UnsupportedQuantizationError as error:
            faults.append(Fault(f"config_groups.{name}", f"is malformed: {error}"))
        targets = _names(entry.get("targets"), f"config_groups.{name}.targets", faults)
        own_format = entry.get("format")
        groups.append(ConfigGroup(name, targets, own_format if isinstance(own_format, str) else None, signature, entry))
    cache = spelled.get("kv_cache_scheme")
    kv_cache = None
    if isinstance(cache, dict):
        unknown += _unknown_in(cache, "kv_cache_scheme", ARGUMENT_KEYS)
        try:
            kv_cache = Arguments.of({key: value for key, value in cache.items() if key in ARGUMENT_KEYS})
        except UnsupportedQuantizationError as error:
            faults.append(Fault("kv_cache_scheme", f"is malformed: {error}"))
    elif cache is not None:
        faults.append(Fault("kv_cache_scheme", "is not an object"))
    ignore = _names(spelled.get("ignore"), "ignore", faults)
    return QuantConfig(raw, method, quant_format, tuple(groups), ignore, kv_cache, tuple(unknown), tuple(faults))


def _names(value: Any, where: str, faults: list[Fault]) -> tuple[str, ...]:
    """A list of names; anything else is a fault, and no names."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        faults.append(Fault(where, "is not a list of names"))
        return ()
    return tuple(value)


def _unknown_in(entry: Mapping[str, Any], where: str, known: frozenset[str]) -> list[str]:
    return [f"{where}.{key}" for key in sorted(entry.keys() - known)]


def _says_something(value: Any) -> bool:
    """True if a part of the config that is not computed here asks for anything: `dense` is no sparsity."""
    return bool(value) and not (isinstance(value, dict) and value.get("format") == "dense")


type _Spelled = tuple[Mapping[str, Any], Sequence[tuple[str, str]]]

_SPELLINGS: Mapping[str, Callable[[Mapping[str, Any]], _Spelled]] = MappingProxyType(
    {COMPRESSED_TENSORS: lambda raw: (raw, ()), MODELOPT_FORMAT: in_compressed_tensors_words}
)
"""`quant_method` → what turns such a config into the words of compressed-tensors, and names what is wrong in it."""
