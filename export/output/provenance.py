"""The versions that made a checkpoint, recorded beside it; see `model_card`."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from amaxbridge.build_version import build_version
from amaxbridge.export.disk.strict_json import misfit, read_json_object
from amaxbridge.mappings.errors import CheckpointError

RECORD_FILE = "amaxbridge.json"
GUESS = "guess"
"""What it says of an architecture whose tensors were taken by their names, and what users say to have it so."""
MADE_FROM = "made_from"
"""Its key for the fingerprint of all that an output is made from; null where no other run could tell."""

REPAIRS = "repairs"
"""Its key for what `repair` has changed, time after time."""

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


_TEXT, _TEXTS, _COUNT = (str, None), ([str], None), (int, None)
_FORM = {
    MADE_FROM: _TEXT,
    "base_model": _TEXT,
    "architecture": _TEXT,
    "scheme": _TEXT,
    "formats": _TEXTS,
    "kv_cache": (str, bool, None),
    "bytes": ({"before": int, "after": int}, None),
    "quantized": _COUNT,
    "ignored": _TEXTS,
    "unquantized": ({str: int}, None),
    "mixed_groups": _TEXTS,
    "amax": ({"collected": int, "missing": [str], "filled": {str: str}, "divergent": {str: [float]}}, None),
    "snr": ({"mean": float, "lowest": float, "lowest_module": str}, None),
    "versions": ({str: str}, None),
    "notes": _TEXTS,
    "command_line": _TEXT,
    REPAIRS: ([{}], None),
}


def read_record(output: Path) -> dict[str, Any] | None:
    """What an output records of itself; None if there is no record.

    Raises:
        CheckpointError: the file is not JSON, or fields that are read here are of another type.
    """
    file = output / RECORD_FILE
    record = read_json_object(file)
    if record is None:
        return None
    wrong = misfit(record, _FORM)
    divergent = (record.get("amax") or {}).get("divergent") or {} if wrong is None else {}
    wrong = wrong or next(
        (f"amax.divergent.{name} is not two numbers" for name, two in divergent.items() if len(two) != 2), None
    )
    if wrong:
        raise CheckpointError(f"{file} was not written by amaxbridge, or was changed: {wrong}. Remove it")
    return record


def was_guessed(output: Path) -> bool:
    """True if an output records that what its architecture's tensors are was guessed."""
    try:
        record = read_record(output)
    except CheckpointError:
        return False
    return record is not None and record.get("architecture") == GUESS


def made_from(output: Path) -> str | None:
    """The fingerprint that an output records; None if there is none."""
    try:
        record = read_record(output)
    except CheckpointError:  # of another program, or of a run that is writing it
        return None
    return None if record is None else record.get(MADE_FROM)
