"""Where a Hugging Face directory says that it is quantized: in config.json, at any depth, or in a file beside it.

    config.json                    quantization_config, compression_config: at the top, in text_config, in any part
    hf_quant_config.json           ModelOpt
    quantize_config.json           AutoGPTQ, before it wrote into config.json
    quant_config.json              AutoAWQ, likewise

A checkpoint that is written from such a directory must not carry these on: they describe other tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amaxbridge.export.disk.strict_json import read_json_object
from amaxbridge.export.schemes import COMPRESSED_TENSORS

MODELOPT = "modelopt"
_KEYS = ("quantization_config", "compression_config")
_CONFIG_FILE = "config.json"
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
FILES_OF_QUANTIZATION = (*_FILES, "recipe.yaml")
"""Files that describe the quantization of a directory's weights, and nothing else."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One place where a directory says how its weights are quantized.

    Args:
        where: the place: `config.json: text_config.quantization_config`, or a file.
        method: the program or format, in the words of `quant_method`; "" if the place does not say.
        raw: what stands there.
    """

    where: str
    method: str
    raw: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.where} says {self.method or 'nothing of the method'}"


def declared_quantization(config: Mapping[str, Any], directory: Path | None = None) -> list[Declared]:
    """Every place where a directory says how its weights are quantized, config.json first.

    Args:
        config: config.json.
        directory: the directory, for the files beside config.json; None if there is none.

    Raises:
        CheckpointError: such a file is not a JSON object.
    """
    found = [Declared(f"{_CONFIG_FILE}: {path}", _method(raw), raw) for path, raw in _in_config(config)]
    for file in (directory / name for name in _FILES) if directory is not None else ():
        if (raw := read_json_object(file)) is not None:
            inner = raw.get("quantization", raw)
            found.append(Declared(file.name, _method_of_file(file.name, raw), inner if isinstance(inner, dict) else {}))
    return found


def without_declarations(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without any word on quantization, at any depth."""
    return {
        key: _without(value)
        for key, value in config.items()
        if not (key in _KEYS and (value is None or isinstance(value, dict)))
    }


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return without_declarations(value)
    return [_without(each) for each in value] if isinstance(value, list) else value


def _in_config(config: Mapping[str, Any], path: Sequence[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in _KEYS:
        if isinstance(config.get(key), dict) and config[key]:
            yield ".".join((*path, key)), config[key]
    for key, value in config.items():
        if isinstance(value, dict) and key not in _KEYS:
            yield from _in_config(value, (*path, key))


def _method(raw: Mapping[str, Any]) -> str:
    """What a quantization config says of its method. Some older ones do so by their keys alone."""
    method = raw.get("quant_method")
    if method is None:
        if "quant_algo" in raw:
            return MODELOPT
        return COMPRESSED_TENSORS if "config_groups" in raw or "quantization_status" in raw else ""
    method = str(method).lower()
    if method.startswith(MODELOPT):
        return MODELOPT
    return COMPRESSED_TENSORS if method.replace("_", "-") == COMPRESSED_TENSORS else method


def _method_of_file(name: str, raw: Mapping[str, Any]) -> str:
    if name == "hf_quant_config.json":
        return MODELOPT
    return str(raw.get("quant_method") or ("awq" if {"w_bit", "q_group_size", "version"} & raw.keys() else "gptq"))
