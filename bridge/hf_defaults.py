"""Completes config.json without transformers, from a table of transformers' defaults.

The table, `hf_defaults.json`, holds the fields of config.json that an export from the disk reads, by architecture:

    defaults   a field that is off, on or empty if config.json lacks it → its default
    same       a field → another name that config.json may have for it
    required   fields that must be present: sizes, numbers and lists are never filled in

`tests/support/hf_defaults_table.py` makes it from transformers' own classes, and a test compares both.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from amaxbridge.mappings.extras import MissingExtraError
from amaxbridge.mappings.family import ModelFamily


def completed(written: Mapping[str, Any], family: ModelFamily) -> dict[str, Any]:
    """A config.json with every field that an export from the disk reads.

    Raises:
        MissingExtraError: it lacks fields that only transformers fills in. The message names them. Or the family is
            new, and the table not made again.
    """
    of_family = written["architectures"] if family.classifier_of is None else [family.classifier_of]
    entry = next((entry for name, entry in _table().items() if name in of_family), None)
    if entry is None:
        raise MissingExtraError(
            f"bridge/hf_defaults.json has no defaults of {', '.join(written['architectures'])}, which transformers "
            "fills in: pip install 'amaxbridge[megatron]'. After adding a family, make the table again: "
            "python -m tests.support.hf_defaults_table"
        )
    part = family.language_part
    told = dict((written.get(part) or written) if part else written)
    told = {name: told[other] for name, other in entry["same"].items() if other in told} | told
    absent = [name for name in entry["required"] if name not in told]
    if absent:
        raise MissingExtraError(
            f"config.json does not say {', '.join(absent)}, which transformers fills in: write them there, or "
            "pip install 'amaxbridge[megatron]'"
        )
    defaults: dict[str, Any] = entry["defaults"]
    told = defaults | told
    if part is None:
        return told
    return {"tie_word_embeddings": defaults["tie_word_embeddings"], **written, part: told}


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    table: dict[str, Any] = json.loads((files(__package__) / "hf_defaults.json").read_bytes())
    architectures: Mapping[str, Mapping[str, Any]] = table["architectures"]
    return architectures
