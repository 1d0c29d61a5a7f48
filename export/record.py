"""How a checkpoint was made, kept beside it: the options of the command, and the versions of what made it."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

RECORD_FILE = "amaxbridge.json"

_PACKAGES = (
    "amaxbridge", "torch", "megatron-core", "nvidia-modelopt", "compressed-tensors", "transformers", "safetensors"
)  # fmt: skip


def record_json(record: Mapping[str, Any]) -> bytes:
    """The file: what is given, then `versions`."""
    return (json.dumps({**record, "versions": versions()}, indent=2, ensure_ascii=False) + "\n").encode()


def versions() -> dict[str, str]:
    """Of the packages that have a part in the output and are installed. None is imported."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
