"""The files beside the tensors: config.json with its `quantization_config`, the index, and what is carried over."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amaxbridge.export.disk.input_paths import leaves
from amaxbridge.export.disk.shard_layout import SINGLE_FILE, Layout
from amaxbridge.export.disk.strict_json import read_json_object
from amaxbridge.export.output.provenance import RECORD_FILE
from amaxbridge.export.quantization_declared import FILES_OF_QUANTIZATION, without_declarations
from amaxbridge.export.schemes.scheme import Scheme, arguments
from amaxbridge.mappings.config_fields import check_all_fields
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.names import split_at_numbers

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
QUANT_STATE_FILE = "quant_state.safetensors"
CARD_FILE = "README.md"

_WEIGHT_SUFFIXES = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".nemo", ".gguf",
    ".onnx", ".onnx_data", ".h5", ".msgpack",
)  # fmt: skip
_WRITTEN_ANEW = (
    CONFIG_FILE, CARD_FILE, RECORD_FILE, "report.html", "report.json",
    *FILES_OF_QUANTIZATION,
)  # fmt: skip


_log = logging.getLogger("amaxbridge")


def read_config_json(directory: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory.

    Raises:
        UsageError: there is none, it is not an object in strict JSON, or fields have values that no model has.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UsageError(f"{directory} is not a Hugging Face model directory: no {CONFIG_FILE} there")
    config = read_json_object(file)
    check_all_fields(config, file)
    return config


def config_json(hf_config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> bytes:
    """config.json of the output: the source's without its own quantization, at any depth, and with this one."""
    config = without_declarations(hf_config)
    if quantization is not None:
        config["quantization_config"] = quantization
    return json_bytes(config)


def quantization_config(
    schemes: Mapping[str, Scheme], ignore: Sequence[str], *, kv_cache: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors.

    It has only keys that all engines accept, and groups `group_0`, `group_1`, … with a format each. A single scheme
    targets the class `Linear`; several name their modules, because engines must not find both kinds of targets.

    Args:
        schemes: quantized module → its scheme.
        ignore: the unquantized linear modules.
        kv_cache: True if the layers have `k_scale` and `v_scale`, for an FP8 key-value cache.
    """
    members: dict[str, list[str]] = {}
    for module, scheme in schemes.items():
        members.setdefault(json.dumps(scheme.config_group), []).append(module)
    groups = [json.loads(group) for group in members]
    for group, modules in zip(groups, members.values(), strict=True):
        others = (schemes.keys() - set(modules)) | set(ignore)
        group["targets"] = ["Linear"] if len(groups) == 1 and "lm_head" not in schemes else _patterns(modules, others)
        group["output_activations"] = None
    formats = {group["format"] for group in groups}
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": list(ignore),
    }
    return config | ({"kv_cache_scheme": arguments(8, "float", "tensor")} if kv_cache else {})


def _patterns(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Targets for exactly these modules: patterns over numbers, or names where a pattern would match more."""
    taken = {tuple(split_at_numbers(name)[::2]) for name in others}
    targets: dict[str, None] = {}
    for module in modules:
        between = tuple(split_at_numbers(module)[::2])
        targets[module if between in taken else "re:" + r"\d+".join(map(re.escape, between)) + "$"] = None
    return list(targets)


def index_json(layout: Layout, *, alone: bool = True) -> bytes | None:
    """The safetensors index, or None for the single file that needs none.

    Args:
        layout: the shards.
        alone: True if no other safetensors file lies beside the shards. Without an index, vLLM and SGLang load all.
    """
    if alone and [shard.file_name for shard in layout.shards] == [SINGLE_FILE]:
        return None
    return json_bytes({"metadata": {"total_size": layout.total_size}, "weight_map": layout.weight_map})


def carried_files(source: Path) -> dict[str, Path]:
    """The files of a Hugging Face directory that are carried over unchanged: path in the output → file.

    Tokenizer, chat templates, remote code, generation config, licence, images of the card; also directories, except
    hidden ones and those with weights of their own (`original/`, `onnx/`), which hold the model again.
    """
    carried, left = _sorted_out(source)
    if leaving := [f"{file} → {file.resolve()}" for file in _links_out(source)]:
        _log.warning("%s: links to files outside of it are not carried over:%s", source, listing(leaving))
    if left:
        _log.warning("%s: directories with weights of their own are not carried over:%s", source, listing(left))
    return carried


def output_fingerprint(plan: str, config: Mapping[str, Any], source: Path | None) -> str:
    """A hash of everything that an output is made from: the plan, config.json and the source's other files."""
    digest = hashlib.sha256(plan.encode() + json.dumps(config, sort_keys=True).encode())
    others = {} if source is None else {name: file.read_bytes() for name, file in _sorted_out(source)[0].items()}
    for name, content in {**others, CARD_FILE: source_card(source).encode()}.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def source_card(source: Path | None) -> str:
    """The model card of a source; empty if it has none, or if it is a link to a file outside of it."""
    card = None if source is None else source / CARD_FILE
    if source is None or card is None or not card.is_file() or leaves(card, source):
        return ""
    return card.read_text(encoding="utf-8", errors="replace")


def _sorted_out(source: Path) -> tuple[dict[str, Path], list[str]]:
    """The files that are carried over, and the directories that are not. Links out of the source are never followed."""
    carried = {}
    left = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _WRITTEN_ANEW and not path.name.endswith(_WEIGHT_SUFFIXES):
            carried[path.name] = path
        elif path.is_dir() and not path.name.startswith((".", "__")):
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
            if any(file.name.endswith(_WEIGHT_SUFFIXES) for file in inside):
                left.append(path.name)
            else:
                carried |= {file.relative_to(source).as_posix(): file for file in inside}
    return {name: file for name, file in carried.items() if not leaves(file, source)}, left


def _links_out(source: Path) -> list[Path]:
    return [path for path in sorted(source.rglob("*")) if path.is_symlink() and leaves(path, source)]


def json_bytes(content: object) -> bytes:
    """Returns JSON in the form of a checkpoint's files."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
