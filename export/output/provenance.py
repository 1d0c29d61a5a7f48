"""The versions that made a checkpoint, recorded beside it; see `model_card`."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from amaxbridge.build_version import build_version

RECORD_FILE = "amaxbridge.json"
MADE_FROM = "made_from"
"""Its key for the fingerprint of all that an output is made from; null where no other run could tell."""

_PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "compressed-tensors", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Of the packages that have a part in the output and are installed. None is imported."""
    found = {"amaxbridge": build_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def made_from(output: Path) -> str | None:
    """The fingerprint that an output records; None if there is none."""
    try:
        record = json.loads((output / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return record.get(MADE_FROM) if isinstance(record, dict) else None
