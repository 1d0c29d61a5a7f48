"""The files beside the tensors: config.json with its `quantization_config`, the index, and what is carried over."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.layout import Layout

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def config_json(hf_config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> bytes:
    """config.json of the output: the source's, with `quantization_config` replaced, or removed where there is none."""
    config = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    if quantization is not None:
        config["quantization_config"] = quantization
    return _json(config)


def index_json(layout: Layout) -> bytes | None:
    """The safetensors index, or None for a single file, which needs none."""
    if len(layout.shards) == 1:
        return None
    return _json({"metadata": {"total_size": layout.total_size}, "weight_map": layout.weight_map})


def carried_files(source: Path) -> list[Path]:
    """Files of a Hugging Face directory that go along unchanged: tokenizer, chat template, remote code, licence."""
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file() and path.name != CONFIG_FILE and not path.name.endswith(_WEIGHT_SUFFIXES)
    )


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
