"""What ModelOpt's checkpoints say of themselves, written and read: hf_quant_config.json, and its words in config.json.

Both say the same, `quant_algo` for all linear modules that are not excluded, or `MIXED_PRECISION` and the algorithm of
each. ModelOpt 0.47 writes both files; older versions wrote the first alone, and newer ones mean to write the second
alone.

    hf_quant_config.json: quantization    config.json: quantization_config
    quant_algo                            quant_algo
    exclude_modules                       ignore                  names, or with * and ? as in file names
    kv_cache_quant_algo                   kv_cache_scheme         "FP8", "NVFP4", or {num_bits, type, dynamic}
    group_size                            config_groups.…         of some algorithms
    quantized_layers                      quantized_layers        of MIXED_PRECISION
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Any

from amaxbridge.export.amax.cache_scales import CACHE_FORMATS, CacheFormat
from amaxbridge.export.schemes import MODELOPT_FORMAT, Scheme, algorithms, scheme_of_algorithm

HF_QUANT_CONFIG_FILE = "hf_quant_config.json"
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""The format's, not the program's: engines ask for this name. The version is the one whose format is written."""
MIXED = "MIXED_PRECISION"
_IN_GROUPS = ("FP8", "NVFP4", "W4A16_NVFP4")  # the algorithms for which ModelOpt writes config_groups
_WITHOUT_SIZE = ("mxfp4",)  # the algorithm whose group_size ModelOpt does not write
_FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
_RECORDED = frozenset(("producer", "quant_method", "config_groups", "group_size"))  # they follow from the algorithm
_READ = frozenset(
    (
        "quant_algo", "exclude_modules", "ignore", "kv_cache_quant_algo", "kv_cache_scheme", "quantized_layers",
        "has_zero_point", "pre_quant_scale",
    )
)  # fmt: skip
_PACKED_EXPERTS = ".experts"
EVERY_MODULE = "re:.*"
"""The target of the one algorithm of a config that is not MIXED_PRECISION."""


# Writing


def hf_quant_config(
    schemes: Mapping[str, Scheme], excluded: Sequence[str], *, cache: CacheFormat | None
) -> dict[str, Any]:
    """hf_quant_config.json, as ModelOpt writes it.

    Args:
        schemes: quantized module → its scheme.
        excluded: entries for the unquantized linear modules: names, or wildcards as of file names.
        cache: how the key-value cache is quantized, if there are scales of it.
    """
    layers = {module: _layer(scheme) for module, scheme in schemes.items()}
    kinds = {json.dumps(layer): layer for layer in layers.values()}
    said: dict[str, Any] = {"quant_algo": MIXED, "kv_cache_quant_algo": cache.algorithm if cache else None}
    said |= next(iter(kinds.values())) if len(kinds) == 1 else {"quantized_layers": layers}
    return {"producer": _PRODUCER, "quantization": {**said, "exclude_modules": list(excluded)}}


def in_config_json(written: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json that says what an hf_quant_config.json says."""
    said = written["quantization"]
    config: dict[str, Any] = {}
    layers: Mapping[str, Mapping[str, Any]] = said.get("quantized_layers", {})
    if layers:
        members: dict[str, list[str]] = {}
        for module, layer in layers.items():
            members.setdefault(json.dumps(layer), []).append(module)
        groups = ((json.loads(layer), sorted(modules)) for layer, modules in members.items())
        config["config_groups"] = {
            f"group_{number}": {**_group(layer), "targets": modules} for number, (layer, modules) in enumerate(groups)
        }
        config["quantized_layers"] = layers
    elif said["quant_algo"] in _IN_GROUPS:
        config["config_groups"] = {"group_0": {**_group(said), "targets": ["Linear"]}}
    config |= {"ignore": said["exclude_modules"], "quant_algo": said["quant_algo"]}
    algorithm = said["kv_cache_quant_algo"]
    config |= {"kv_cache_scheme": _FP8_CACHE if algorithm == "FP8" else algorithm} if algorithm else {}
    return {**config, "producer": written["producer"], "quant_method": MODELOPT_FORMAT}


def _layer(scheme: Scheme) -> dict[str, Any]:
    width = scheme.signature.weights.group_size if scheme.stored_as not in _WITHOUT_SIZE else None
    return {"quant_algo": scheme.stored_as, **({"group_size": width} if width else {})}


def _group(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of `config_groups` for an algorithm."""
    scheme = scheme_of_algorithm(layer["quant_algo"])
    assert scheme is not None
    weights = scheme.signature.weights
    size = {"group_size": weights.group_size} if weights.group_size else {}
    numbers = {"dynamic": False, "num_bits": weights.bits, "type": "float", **size}
    inputs = {} if scheme.signature.inputs is None else {"input_activations": numbers}
    return {**inputs, "weights": {**numbers, **({"strategy": "channel"} if weights.strategy == "channel" else {})}}


# Reading


def in_compressed_tensors_words(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A config of ModelOpt in the words of compressed-tensors, and what in it is wrong: where, and what.

    Unknown keys are returned as they are.

    Args:
        raw: `quantization_config` of config.json, or `quantization` of hf_quant_config.json.
    """
    faults: list[tuple[str, str]] = []
    spelled: dict[str, Any] = {key: value for key, value in raw.items() if key not in _RECORDED | _READ}
    algorithm = raw.get("quant_algo")
    layers = raw.get("quantized_layers") if algorithm == MIXED else None
    if algorithm == MIXED and not _are_layers(layers):
        faults.append(("quantized_layers", f"is no object of layers with a quant_algo each, which {MIXED} needs"))
        layers = {}
    asked: dict[str, list[str]] = {}
    for module, layer in (layers or {}).items():
        asked.setdefault(str(layer["quant_algo"]), []).extend(_targets(module))
    asked = asked if algorithm == MIXED else {str(algorithm or ""): [EVERY_MODULE]}
    groups: dict[str, Any] = {}
    for name, targets in asked.items():
        scheme = scheme_of_algorithm(name)
        if scheme is None:
            faults.append(("quant_algo", f"is {name or 'missing'}; known: {', '.join(algorithms())}, {MIXED}"))
        else:
            groups[f"group_{len(groups)}"] = {**_plain_group(scheme), "targets": targets}
    faults += [(key, "is true, and its tensors are not read here") for key in _unread(raw)]
    excluded = excluded_modules(raw)
    if excluded is None:
        faults.append(("ignore" if "ignore" in raw else "exclude_modules", "is not a list of names"))
    cache = raw.get("kv_cache_scheme") or raw.get("kv_cache_quant_algo")
    if isinstance(cache, str):
        caches = {each.algorithm: each for each in CACHE_FORMATS.values() if each.algorithm}
        known = caches.get(cache.upper())
        if known is None:
            faults.append(("kv_cache_quant_algo", f"is {cache}; {' and '.join(caches)} are read"))
        cache = known and dict(known.config)
    spelled |= {
        "quant_method": MODELOPT_FORMAT,
        "format": MODELOPT_FORMAT,
        "config_groups": groups,
        "ignore": [_entry(entry) for entry in excluded or ()],
    }
    return spelled | ({"kv_cache_scheme": cache} if cache else {}), faults


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """Keys that no ModelOpt known here writes, and that say something."""
    return [
        key for key, value in raw.items() if key not in _RECORDED | _READ and value not in (None, False, "", [], {})
    ]


def excluded_modules(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The entries for unquantized modules, names and wildcards, as they stand; None if they are no list of names."""
    found = raw.get("ignore", raw.get("exclude_modules")) or []
    return tuple(found) if isinstance(found, list) and all(isinstance(entry, str) for entry in found) else None


def _are_layers(layers: Any) -> bool:
    return isinstance(layers, dict) and all(
        isinstance(layer, dict) and isinstance(layer.get("quant_algo"), str) for layer in layers.values()
    )


def _targets(module: str) -> Iterator[str]:
    """A quantized layer, or all experts of a layer, which ModelOpt names as one."""
    yield module
    if module.endswith(_PACKED_EXPERTS):
        yield f"re:{re.escape(module)}\\..*"


def _unread(raw: Mapping[str, Any]) -> Iterator[str]:
    yield from (key for key in ("has_zero_point", "pre_quant_scale") if raw.get(key))


def _plain_group(scheme: Scheme) -> dict[str, Any]:
    """The scheme's config group with the keys that readers compare."""

    def arguments(part: str) -> dict[str, Any] | None:
        found = scheme.config_group[part]
        return found and {key: value for key, value in found.items() if key != "scale_dtype"}

    return {
        "format": MODELOPT_FORMAT,
        "weights": arguments("weights"),
        "input_activations": arguments("input_activations"),
    }


def _entry(excluded: str) -> str:
    """An entry of `exclude_modules`: a name, or a wildcard as of file names, here as a regular expression."""
    return f"re:{translate(excluded)}" if set("*?[") & set(excluded) else excluded
